// Load a model and answer chats, in the browser.

/**
 * Where things come from. `load` takes other places; a path is relative to this file.
 *
 *   library  Transformers.js 4.3.2, a module
 *   runtime  the folder of its onnxruntime. A library from elsewhere finds its own
 *   model    a folder of `optimum-cli export lfm2`: a URL, or a path that begins with "." or "/". Or an id on the Hub
 *
 * @typedef {{library?: string | null, runtime?: string | null, model?: string | null}} Places
 */
const PLACES = { library: "./library/transformers.min.js", runtime: "./onnxruntime", model: "./model" };
const RUNTIME = "ort-wasm-simd-threaded.asyncify";
const HUB = { host: "https://huggingface.co/", path: "{model}/resolve/{revision}/" };
const HUB_ID = /^\w[\w.-]*\/[\w.-]+$/;

/**
 * A turn of a chat. Only a user's turn has pictures.
 *
 * @typedef {{role: string, content: string, pictures?: Blob[]}} Turn
 */

/** What a chat template writes for a picture, and the library's processor reads. */
const imageToken = ({ config, tokenizer }) => config.image_token ?? tokenizer.config.image_token ?? "<image>";

// What a folder can do. `Model` and `Reader` name the library's classes that run it and read a chat, and `read` makes a
// chat into the model's inputs. `file` is the part that has a file in every precision, and `refused` has precisions that
// the page does not choose by itself.
const TEXT = {
  pictures: false,
  file: "model",
  refused: [],
  Model: "AutoModelForCausalLM",
  Reader: "AutoTokenizer",
  tokenizer: (reader) => reader,
  read: ({ reader }, chat) => reader.apply_chat_template(chat, { add_generation_prompt: true, return_dict: true }),
};
const TEXT_AND_PICTURES = {
  pictures: true,
  file: "decoder_model_merged",
  refused: [],
  Model: "AutoModelForImageTextToText",
  Reader: "AutoProcessor",
  tokenizer: (reader) => reader.tokenizer,
  async read({ library, reader }, chat) {
    const token = imageToken(reader);
    if (chat.some(({ content }) => content.includes(token))) throw new Error(`Leave ${token} out: it stands for a picture.`);
    const turns = chat.map(({ role, content, pictures }) => ({
      role,
      content: pictures ? [...pictures.map(() => ({ type: "image" })), { type: "text", text: content }] : content,
    }));
    const text = reader.apply_chat_template(turns, { add_generation_prompt: true });
    const options = { add_special_tokens: false }; // the template has written them
    const pictures = await Promise.all(chat.flatMap((turn) => turn.pictures ?? []).map((blob) => library.RawImage.read(blob)));
    return pictures.length ? reader(pictures, text, options) : reader.tokenizer(text, options);
  },
};
// In these files QMoE rounds activations to 8 bits, which onnxruntime takes only from 1.31 on (docs/moe.md).
const WITH_EXPERTS = { ...TEXT, refused: ["q4", "q8"] };
// By the model type in config.json. All others are models of text.
const KINDS = { lfm2_moe: WITH_EXPERTS, lfm2_vl: TEXT_AND_PICTURES, lfm3_vl: TEXT_AND_PICTURES };
const kindOf = (config) => KINDS[config.model_type] ?? TEXT;

// What follows the name of a precision's file, and the precisions in the order in which a device prefers them.
const SUFFIXES = { fp32: "", fp16: "_fp16", q8: "_quantized", q4: "_q4", q4f16: "_q4f16" };
const PREFERRED = { webgpu: ["q4f16", "q4", "fp16", "fp32", "q8"], wasm: ["q4", "q8", "fp32"] };
const IN_HALF = ["fp16", "q4f16"]; // need a GPU that computes in half precision

const CHUNK = 256; // the tokens of a prompt that a GPU reads at once

/**
 * Import the library, and tell it where the model is.
 *
 * @param {Places} places
 * @returns {Promise<{library: object, name: string}>} the library, and how its `from_pretrained` calls the model
 */
export async function open({ library, runtime, model } = {}) {
  const address = (path) => new URL(path, import.meta.url).href;
  const imported = await import(address(library ?? PLACES.library));
  const { env } = imported;
  if (runtime || !library) {
    const file = address(`${runtime ?? PLACES.runtime}/${RUNTIME}`);
    env.backends.onnx.wasm.wasmPaths = { mjs: `${file}.mjs`, wasm: `${file}.wasm` };
    env.useWasmCache = false; // the files lie beside the page
  }
  const place = model ?? PLACES.model;
  const onHub = HUB_ID.test(place);
  const folder = address(place).replace(/\/$/, "");
  const end = folder.lastIndexOf("/") + 1;
  env.allowLocalModels = false; // it would fetch each file twice, once for its size
  env.useBrowserCache = onHub; // a folder may be exported again; for an unchanged file a server answers 304
  env.remoteHost = onHub ? HUB.host : folder.slice(0, end);
  env.remotePathTemplate = onHub ? HUB.path : "{model}/";
  return { library: imported, name: onHub ? place : folder.slice(end) };
}

/** Return what the browser has: "webgpu" with an adapter, else "wasm", and whether that computes in half precision. */
export async function chooseDevice() {
  const adapter = await navigator.gpu?.requestAdapter().catch(() => null);
  return adapter ? { device: "webgpu", half: adapter.features.has("shader-f16") } : { device: "wasm", half: false };
}

/** Return the file that a device prefers among those that config.json names, and its precision. fp32 if it names none. */
export function chooseFile(config, device, half, dtype) {
  const kind = kindOf(config);
  const named = config["transformers.js_config"]?.use_external_data_format ?? {};
  const file = (precision) => `${kind.file}${SUFFIXES[precision]}.onnx`;
  const runs = (precision) => !kind.refused.includes(precision) && (half || !IN_HALF.includes(precision));
  const suits = (precision) => file(precision) in named && runs(precision);
  const chosen = dtype ?? PREFERRED[device].find(suits) ?? "fp32";
  return { dtype: chosen, file: chosen in SUFFIXES ? file(chosen) : chosen };
}

/**
 * Load the model's files of one precision, onnx/{name}{suffix}.onnx, and what reads a chat for it.
 *
 * @param {Places & {dtype?: string | null, device?: string | null, onProgress?: (loaded: number, total: number) => void}} options
 *   without `dtype` and `device`, what suits this browser and this folder
 * @returns {Promise<object>} what `answer` takes. `kind.pictures` says whether the model takes pictures. `device`,
 *   `dtype` and `file` say what runs
 */
export async function load({ dtype = null, device = null, onProgress = () => {}, ...places } = {}) {
  const { library, name } = await open(places);
  const has = await chooseDevice();
  const chosen = device ?? has.device;
  const config = await library.AutoConfig.from_pretrained(name);
  const kind = kindOf(config);
  const taken = chooseFile(config, chosen, has.half, dtype);
  const [reader, model] = await Promise.all([
    library[kind.Reader].from_pretrained(name),
    library[kind.Model].from_pretrained(name, {
      dtype: taken.dtype,
      device: chosen,
      progress_callback: (event) => {
        if (event.status === "progress_total") onProgress(event.loaded, event.total);
      },
    }),
  ]);
  const loaded = { library, kind, reader, model, device: chosen, ...taken, turn: null, kept: null };
  replaceForward(loaded);
  return loaded;
}

/**
 * Let the model read only the new tokens of a prompt, in chunks on a GPU, and let a worker take its messages before each.
 *
 * WebAssembly computes without a pause, and a stop would wait for the end. `loaded.turn` is what `answer` is reading.
 */
function replaceForward(loaded) {
  const { port1, port2 } = new MessageChannel(); // setTimeout would wait 4 ms
  const pause = () =>
    new Promise((resolve) => {
      port1.onmessage = resolve;
      port2.postMessage(null);
    });
  const forward = loaded.model.forward.bind(loaded.model);
  const call = async (inputs) => {
    await pause();
    return forward(inputs);
  };
  loaded.model.forward = async (inputs) => {
    const turn = loaded.turn;
    if (!turn || turn.read.length) return call(inputs); // one token of the answer
    // The library would cut the prompt by the length of the first attention layer's cache, which may be a window.
    const { ids, start, cache } = turn;
    const total = ids.dims[1];
    const whole = loaded.device !== "webgpu" || "pixel_values" in inputs; // it places all pictures in one call
    let outputs;
    for (let from = start; from < total; ) {
      const to = whole ? total : Math.min(from + CHUNK, total);
      if (outputs) cache.update(presentAsPast(outputs));
      const mask = inputs.attention_mask.slice(null, [0, to]);
      outputs = await call({ ...inputs, input_ids: ids.slice(null, [from, to]), attention_mask: mask });
      turn.read.push(to - from);
      from = to;
    }
    return outputs;
  };
}

/** Return the caches among the outputs of a call, under the names of its inputs. */
function presentAsPast(outputs) {
  const caches = Object.entries(outputs).filter(([name]) => name.startsWith("present"));
  const past = (name) => name.replace("present_", "past_").replace(/^present/, "past_key_values");
  return Object.fromEntries(caches.map(([name, tensor]) => [past(name), tensor]));
}

/**
 * Return the model's inputs for a chat: `input_ids` and `attention_mask`, and the pixels of its pictures.
 *
 * @param {object} loaded the result of `load`
 * @param {Turn[]} chat the turns so far; the last one is the user's
 */
export const read = async (loaded, chat) => loaded.kind.read(loaded, chat);

/** Return what the model has read if a prompt goes on from it, else null. Its states hold no earlier place of a text. */
function readBefore({ kept }, ids, pictures) {
  const goesOn = kept && kept.ids.length < ids.length && kept.ids.every((id, i) => id === ids[i]);
  return goesOn && samePictures(kept.pictures, pictures) ? kept : null;
}

function samePictures(these, those) {
  const same = (one, other) => one?.length === other?.length && one.every((value, i) => value === other[i]);
  const names = [...new Set([...Object.keys(these), ...Object.keys(those)])];
  return names.every((name) => name in these && name in those && same(these[name].data, those[name].data));
}

/** Free what the model has read. */
async function forget(loaded) {
  const { kept } = loaded;
  loaded.kept = null;
  await kept?.cache.dispose();
}

/**
 * Generate the next message of a chat, with the settings of the export's generation config.
 *
 * A chat that goes on from the last one is not read again. One answer at a time.
 *
 * @param {object} loaded the result of `load`
 * @param {Turn[]} chat the turns so far; the last one is the user's
 * @param {{maxNewTokens?: number, stop?: object, onText?: (piece: string, tokens: number, seconds: number) => void}} options
 *   `stop` is a stopping criterion of the library. `onText` gets each new piece of text, and the number of tokens and
 *   seconds since the first token
 * @returns {Promise<{text: string, ids: number[], read: number[], speed: number | null}>} `ids` are the new tokens, with
 *   the end of turn. `read` has the number of tokens in each call that read the prompt. `speed` is in tokens per second
 *   after the first token; it is null for an answer of one token
 */
export async function answer(loaded, chat, { maxNewTokens = 512, stop = null, onText = () => {} } = {}) {
  const { input_ids, attention_mask, ...rest } = await read(loaded, chat);
  const pictures = Object.fromEntries(Object.entries(rest).filter(([, value]) => value?.dims));
  const ids = input_ids.tolist()[0];
  const before = readBefore(loaded, ids, pictures);
  if (!before) await forget(loaded);
  loaded.kept = null; // until this answer is there: the cache changes on the way
  const cache = before?.cache ?? new loaded.library.DynamicCache();
  loaded.turn = { ids: input_ids, start: before?.ids.length ?? 0, cache, read: [] };
  const tokenizer = loaded.kind.tokenizer(loaded.reader);
  let tokens = 0;
  let first = 0;
  let last = 0;
  const streamer = new loaded.library.TextStreamer(tokenizer, {
    skip_prompt: true,
    skip_special_tokens: true,
    token_callback_function: () => {
      last = performance.now();
      if (tokens++ === 0) first = last;
    },
    callback_function: (piece) => onText(piece, tokens - 1, (last - first) / 1000),
  });
  let all;
  try {
    const output = await loaded.model.generate({
      input_ids,
      attention_mask,
      ...(before ? {} : rest), // the cache has the pictures
      past_key_values: cache,
      return_dict_in_generate: true,
      max_new_tokens: maxNewTokens,
      streamer,
      stopping_criteria: stop,
    });
    all = output.sequences.tolist()[0];
  } catch (error) {
    await cache.dispose();
    throw error;
  }
  loaded.kept = { ids: all.slice(0, -1), pictures, cache }; // the last token has been chosen and not read
  const generated = all.slice(ids.length).map(Number);
  return {
    ids: generated,
    text: tokenizer.decode(generated, { skip_special_tokens: true }),
    read: loaded.turn.read,
    speed: tokens > 1 ? (tokens - 1) / ((last - first) / 1000) : null,
  };
}
