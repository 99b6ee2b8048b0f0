// The worker that runs the model, so that the page stays responsive while the model computes.
import { answer, load } from "./lfm2.js";

let loaded;
let stop;

const actions = {
  async load(options) {
    loaded = await load({ ...options, onProgress: (done, total) => postMessage({ type: "progress", done, total }) });
    stop = new loaded.library.InterruptableStoppingCriteria();
    const { file, device, kind } = loaded;
    postMessage({ type: "ready", file, device, pictures: kind.pictures, threads: crossOriginIsolated });
  },
  async answer(chat) {
    stop.reset();
    const onText = (piece, tokens, seconds) => postMessage({ type: "text", piece, tokens, seconds });
    postMessage({ type: "answer", ...(await answer(loaded, chat, { stop, onText })) });
  },
  stop: () => stop.interrupt(),
};

onmessage = async ({ data: [action, argument] }) => {
  try {
    await actions[action](argument);
  } catch (error) {
    postMessage({ type: "error", message: error.message ?? String(error) });
  }
};
