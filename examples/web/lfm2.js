// Load the model from /model/ and answer chats, in the browser.
import {
  AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, RawImage, TextStreamer, env,
} from "/library/transformers.min.js";

const RUNTIME = "/onnxruntime/ort-wasm-simd-threaded.asyncify";

env.allowRemoteModels = false;
env.allowLocalModels = true;
env.localModelPath = "/";
env.useBrowserCache = false; // the folder may have been exported again; for an unchanged file the server answers 304
env.useWasmCache = false;
env.backends.onnx.wasm.wasmPaths = { mjs: `${RUNTIME}.mjs`, wasm: `${RUNTIME}.wasm` };

/**
 * A turn of a chat. Only a user's turn has pictures.
 *
 * @typedef {{role: string, content: string, pictures?: Blob[]}} Turn
 */

/** What a chat template writes for a picture, and the library's processor reads. */
const imageToken = ({ config, tokenizer }) => config.image_token ?? tokenizer.config.image_token ?? "<image>";

// What a folder can do. `Reader` is the library's class that reads a chat, and `read` makes a chat into the model's inputs.
const TEXT = {
  pictures: false,
  Model: AutoModelForCausalLM,
  Reader: AutoTokenizer,
  tokenizer: (reader) => reader,
  read: (reader, chat) => reader.apply_chat_template(chat, { add_generation_prompt: true, return_dict: true }),
};
const TEXT_AND_PICTURES = {
  pictures: true,
  Model: AutoModelForImageTextToText,
  Reader: AutoProcessor,
  tokenizer: (reader) => reader.tokenizer,
  async read(reader, chat) {
    const token = imageToken(reader);
    if (chat.some(({ content }) => content.includes(token))) throw new Error(`Leave ${token} out: it stands for a picture.`);
    const turns = chat.map(({ role, content, pictures }) => ({
      role,
      content: pictures ? [...pictures.map(() => ({ type: "image" })), { type: "text", text: content }] : content,
    }));
    const text = reader.apply_chat_template(turns, { add_generation_prompt: true });
    const options = { add_special_tokens: false }; // the template has written them
    const pictures = await Promise.all(chat.flatMap((turn) => turn.pictures ?? []).map((blob) => RawImage.read(blob)));
    return pictures.length ? reader(pictures, text, options) : reader.tokenizer(text, options);
  },
};
// By the model type in config.json. All others are models of text.
const KINDS = { lfm2_vl: TEXT_AND_PICTURES, lfm3_vl: TEXT_AND_PICTURES };

/** Return "webgpu" where the browser has a WebGPU adapter, else "wasm". */
export async function chooseDevice() {
  const adapter = await navigator.gpu?.requestAdapter().catch(() => null);
  return adapter ? "webgpu" : "wasm";
}

/**
 * Load the model's files of `dtype`, onnx/{name}{suffix}.onnx, and what reads a chat for it.
 *
 * @param {{dtype?: string, device?: string | null, onProgress?: (loaded: number, total: number) => void}} options
 * @returns {Promise<{kind: object, reader: object, model: object, dtype: string, device: string}>} `kind.pictures` says
 *   whether the model takes pictures
 */
export async function load({ dtype = "fp32", device = null, onProgress = () => {} } = {}) {
  const chosen = device ?? (await chooseDevice());
  const config = await AutoConfig.from_pretrained("model");
  const kind = KINDS[config.model_type] ?? TEXT;
  const [reader, model] = await Promise.all([
    kind.Reader.from_pretrained("model"),
    kind.Model.from_pretrained("model", {
      dtype,
      device: chosen,
      progress_callback: (event) => {
        if (event.status === "progress_total") onProgress(event.loaded, event.total);
      },
    }),
  ]);
  takeMessages(model);
  return { kind, reader, model, dtype, device: chosen };
}

/** Let a worker take its messages before each token. WebAssembly computes without a pause, and a stop would wait for the end. */
function takeMessages(model) {
  const { port1, port2 } = new MessageChannel(); // setTimeout would wait 4 ms
  const forward = model.forward.bind(model);
  model.forward = async (inputs) => {
    await new Promise((resolve) => {
      port1.onmessage = resolve;
      port2.postMessage(null);
    });
    return forward(inputs);
  };
}

/**
 * Return the model's inputs for a chat: `input_ids` and `attention_mask`, and the pixels of its pictures.
 *
 * @param {{kind: object, reader: object}} loaded the result of `load`
 * @param {Turn[]} chat the turns so far; the last one is the user's
 */
export const read = async ({ kind, reader }, chat) => kind.read(reader, chat);

/**
 * Generate the next message of a chat, with the settings of the export's generation config.
 *
 * @param {{kind: object, reader: object, model: object}} loaded the result of `load`
 * @param {Turn[]} chat the turns so far; the last one is the user's
 * @param {{maxNewTokens?: number, stop?: object, onText?: (piece: string, tokens: number, seconds: number) => void}} options
 *   `stop` is a stopping criterion of the library. `onText` gets each new piece of text, and the number of tokens and
 *   seconds since the first token
 * @returns {Promise<{text: string, ids: number[], speed: number | null}>} `ids` are the new tokens, with the end of turn.
 *   `speed` is in tokens per second after the first token; it is null for an answer of one token
 */
export async function answer(loaded, chat, { maxNewTokens = 512, stop = null, onText = () => {} } = {}) {
  const inputs = await read(loaded, chat);
  const tokenizer = loaded.kind.tokenizer(loaded.reader);
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
  const output = await loaded.model.generate({
    ...inputs,
    max_new_tokens: maxNewTokens,
    streamer,
    stopping_criteria: stop,
  });
  const prompt = inputs.input_ids.dims.at(-1);
  const ids = output.tolist()[0].slice(prompt).map(Number);
  return {
    ids,
    text: tokenizer.decode(ids, { skip_special_tokens: true }),
    speed: tokens > 1 ? (tokens - 1) / ((last - first) / 1000) : null,
  };
}
