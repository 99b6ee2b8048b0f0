// Load the model from /model/ and answer chats, in the browser.
import { AutoModelForCausalLM, AutoTokenizer, TextStreamer, env } from "/library/transformers.min.js";

const RUNTIME = "/onnxruntime/ort-wasm-simd-threaded.asyncify";

env.allowRemoteModels = false;
env.allowLocalModels = true;
env.localModelPath = "/";
env.useBrowserCache = false; // the folder may have been exported again; for an unchanged file the server answers 304
env.useWasmCache = false;
env.backends.onnx.wasm.wasmPaths = { mjs: `${RUNTIME}.mjs`, wasm: `${RUNTIME}.wasm` };

/** Return "webgpu" where the browser has a WebGPU adapter, else "wasm". */
export async function chooseDevice() {
  const adapter = await navigator.gpu?.requestAdapter().catch(() => null);
  return adapter ? "webgpu" : "wasm";
}

/**
 * Load the tokenizer and the file of `dtype`, onnx/model{suffix}.onnx.
 *
 * @param {{dtype?: string, device?: string | null, onProgress?: (loaded: number, total: number) => void}} options
 * @returns {Promise<{tokenizer: object, model: object, dtype: string, device: string}>}
 */
export async function load({ dtype = "fp32", device = null, onProgress = () => {} } = {}) {
  const chosen = device ?? (await chooseDevice());
  const [tokenizer, model] = await Promise.all([
    AutoTokenizer.from_pretrained("model"),
    AutoModelForCausalLM.from_pretrained("model", {
      dtype,
      device: chosen,
      progress_callback: (event) => {
        if (event.status === "progress_total") onProgress(event.loaded, event.total);
      },
    }),
  ]);
  return { tokenizer, model, dtype, device: chosen };
}

/**
 * Generate the next message of a chat, with the settings of the export's generation config.
 *
 * @param {{tokenizer: object, model: object}} loaded the result of `load`
 * @param {{role: string, content: string}[]} chat the turns so far; the last one is the user's
 * @param {{maxNewTokens?: number, onText?: (piece: string, tokens: number, seconds: number) => void}} options
 *   `onText` gets each new piece of text, and the number of tokens and seconds since the first token
 * @returns {Promise<{text: string, ids: number[], speed: number | null}>} `ids` are the new tokens, with the end of turn.
 *   `speed` is in tokens per second after the first token; it is null for an answer of one token
 */
export async function answer({ tokenizer, model }, chat, { maxNewTokens = 512, onText = () => {} } = {}) {
  const inputs = tokenizer.apply_chat_template(chat, { add_generation_prompt: true, return_dict: true });
  let tokens = 0;
  let first = 0;
  let last = 0;
  const streamer = new TextStreamer(tokenizer, {
    skip_prompt: true,
    skip_special_tokens: true,
    token_callback_function: () => {
      last = performance.now();
      if (tokens++ === 0) first = last;
    },
    callback_function: (piece) => onText(piece, tokens - 1, (last - first) / 1000),
  });
  const output = await model.generate({ ...inputs, max_new_tokens: maxNewTokens, streamer });
  const prompt = inputs.input_ids.dims.at(-1);
  const ids = output.tolist()[0].slice(prompt).map(Number);
  return {
    ids,
    text: tokenizer.decode(ids, { skip_special_tokens: true }),
    speed: tokens > 1 ? (tokens - 1) / ((last - first) / 1000) : null,
  };
}
