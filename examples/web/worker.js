// The worker that runs the model, so that the page stays responsive while the model computes.
import { answer, load } from "/lfm2.js";

let loaded;

const actions = {
  async load(options) {
    loaded = await load({ ...options, onProgress: (done, total) => postMessage({ type: "progress", done, total }) });
    postMessage({ type: "ready", dtype: loaded.dtype, device: loaded.device, threads: crossOriginIsolated });
  },
  async answer(chat) {
    const onText = (piece, tokens, seconds) => postMessage({ type: "text", piece, tokens, seconds });
    postMessage({ type: "answer", ...(await answer(loaded, chat, { onText })) });
  },
};

onmessage = async ({ data: [action, argument] }) => {
  try {
    await actions[action](argument);
  } catch (error) {
    postMessage({ type: "error", message: error.message ?? String(error) });
  }
};
