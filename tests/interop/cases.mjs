// The questions that the tests ask Transformers.js, in node and in a browser. Cases and answers are plain JSON.

/**
 * @param {object} library Transformers.js
 * @param {string} name the model's folder, under the library's `env.localModelPath`
 * @param {string} device "cpu" in node, "wasm" or "webgpu" in a browser
 * @returns {Promise<(job: object) => Promise<any>>} answers one case: {action, ...arguments of the action below}
 */
export async function makeClient(library, name, device) {
  const { AutoTokenizer, AutoModelForCausalLM, AutoModelForImageTextToText, Tensor, TextGenerationPipeline } = library;
  const { AutoProcessor, RawImage } = library;
  const tokenizer = await AutoTokenizer.from_pretrained(name);
  const models = {};
  const load = async (dtype) => (models[dtype] ??= await AutoModelForCausalLM.from_pretrained(name, { dtype, device }));
  const matrix = (rows) => new Tensor("int64", BigInt64Array.from(rows.flat(), BigInt), [rows.length, rows[0].length]);
  const numbers = (tensor) => tensor.tolist().map((row) => row.map(Number));
  const render = (chat, options) => tokenizer.apply_chat_template(chat, { add_generation_prompt: true, ...options });

  const actions = {
    /** Return a chat as text and as token ids. */
    render({ chat, options = {} }) {
      const ids = render(chat, { ...options, return_tensor: false, return_dict: false });
      return { text: render(chat, { ...options, tokenize: false }), ids };
    },

    /** Return the new tokens of each prompt, a chat or a text, run as one batch. The tokenizer pads it to `columns`. */
    async generate({ dtype, prompts, max_new_tokens }) {
      const model = await load(dtype);
      const texts = prompts.map((prompt) => (typeof prompt === "string" ? prompt : render(prompt, { tokenize: false })));
      tokenizer.padding_side = "left"; // as the library's own pipeline does
      const inputs = tokenizer(texts, { padding: true, truncation: true, add_special_tokens: false });
      const columns = inputs.input_ids.dims[1];
      const output = numbers(await model.generate({ ...inputs, max_new_tokens }));
      return { columns, rows: output.map((row) => row.slice(columns)) };
    },

    /** Return the new tokens of each row of ids, run as one batch with padding on the left. */
    async continue({ dtype, rows, max_new_tokens }) {
      const model = await load(dtype);
      const columns = Math.max(...rows.map((row) => row.length));
      const padded = (fill) => rows.map((row) => [...Array(columns - row.length).fill(0), ...row.map(fill)]);
      const inputs = { input_ids: matrix(padded((id) => id)), attention_mask: matrix(padded(() => 1)) };
      const output = numbers(await model.generate({ ...inputs, max_new_tokens }));
      return output.map((row) => row.slice(columns));
    },

    /** Return the answer to each message of one chat. Every turn continues from the cache of the previous turn. */
    async turns({ dtype, messages, max_new_tokens }) {
      const model = await load(dtype);
      const chat = [];
      const turns = [];
      let past_key_values = null;
      for (const content of messages) {
        chat.push({ role: "user", content });
        const inputs = render(chat, { return_dict: true });
        const output = await model.generate({ ...inputs, past_key_values, max_new_tokens, return_dict_in_generate: true });
        past_key_values = output.past_key_values;
        const ids = numbers(output.sequences)[0].slice(inputs.input_ids.dims[1]);
        turns.push({ ids, cached: past_key_values.get_seq_length() });
        chat.push({ role: "assistant", content: tokenizer.decode(ids, { skip_special_tokens: true }) });
      }
      return turns;
    },

    /** Return the new tokens of one row with pictures, which `values` has as a processor gives them. */
    async pictures({ dtype, ids, values, max_new_tokens }) {
      const model = await AutoModelForImageTextToText.from_pretrained(name, { dtype, device });
      const inputs = { input_ids: matrix([ids]), attention_mask: matrix([ids.map(() => 1)]) };
      for (const [key, { type, data, dims }] of Object.entries(values)) {
        inputs[key] = new Tensor(type, type === "int64" ? BigInt64Array.from(data, BigInt) : Float32Array.from(data), dims);
      }
      return numbers(await model.generate({ ...inputs, max_new_tokens }))[0].slice(ids.length);
    },

    /** Return what the library's processor makes of a picture. */
    async process({ path }) {
      const processor = await AutoProcessor.from_pretrained(name);
      const { pixel_values, spatial_shapes } = await processor(await RawImage.read(path));
      return { values: Array.from(pixel_values.data), dims: pixel_values.dims, shapes: numbers(spatial_shapes) };
    },

    /** Return what the library's processor makes of several pictures of a model whose patches come without padding. */
    async grids({ paths }) {
      const processor = await AutoProcessor.from_pretrained(name);
      const { pixel_values, image_grid_thw } = await processor(await Promise.all(paths.map((path) => RawImage.read(path))));
      return { values: Array.from(pixel_values.data), dims: pixel_values.dims, shapes: numbers(image_grid_thw) };
    },

    /** Return the answer to a chat as text, from the library's pipeline. */
    async pipeline({ dtype, chat, max_new_tokens }) {
      const generator = new TextGenerationPipeline({ task: "text-generation", model: await load(dtype), tokenizer });
      const [{ generated_text }] = await generator(chat, { max_new_tokens });
      return generated_text.at(-1).content;
    },

    /** Return the logits of every token of one row without padding. */
    async logits({ dtype, ids }) {
      const model = await load(dtype);
      const { logits } = await model({ input_ids: matrix([ids]), attention_mask: matrix([ids.map(() => 1)]) });
      return logits.to("float32").tolist()[0];
    },
  };
  return ({ action, ...rest }) => actions[action](rest);
}
