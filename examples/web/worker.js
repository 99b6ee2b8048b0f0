// The worker that runs the model, so that the page stays responsive while the model computes.
import { InterruptableStoppingCriteria } from "/library/transformers.min.js";

import { answer, load } from "/lfm2.js";

const stop = new InterruptableStoppingCriteria();
let loaded;

const actions = {
  async load(options) {
    loaded = await load({ ...options, onProgress: (done, total) => postMessage({ type: "progress", done, total }) });
    const { dtype, device, kind } = loaded;
    postMessage({ type: "ready", dtype, device, pictures: kind.pictures, threads: crossOriginIsolated });
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
