// An encoder in Transformers.js: node encoder.mjs FOLDER DTYPE < texts > states, a JSON list and a JSON object.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import path from "node:path";

const require = createRequire(new URL("../../examples/web/package.json", import.meta.url));
const { AutoModel, AutoTokenizer, env } = require("@huggingface/transformers");

const folder = path.resolve(process.argv[2]);
env.allowRemoteModels = false;
env.localModelPath = path.dirname(folder);
const tokenizer = await AutoTokenizer.from_pretrained(path.basename(folder));
const model = await AutoModel.from_pretrained(path.basename(folder), { dtype: process.argv[3], device: "cpu" });
const inputs = tokenizer(JSON.parse(readFileSync(0, "utf-8")), { padding: true });
const { last_hidden_state: states } = await model(inputs);
const mask = inputs.attention_mask.tolist().map((row) => row.map(Number));
process.stdout.write(JSON.stringify({ states: states.tolist(), mask }));
