// Runs a published encoder in Transformers.js: the texts as a JSON list on stdin, the vectors of the first on stdout.
import { readFileSync } from "node:fs";
import { AutoModel, AutoTokenizer, env } from "../../examples/web/node_modules/@huggingface/transformers/dist/transformers.node.mjs";

const [folder, dtype] = process.argv.slice(2);
env.allowRemoteModels = false;
env.localModelPath = "";
const tokenizer = await AutoTokenizer.from_pretrained(folder);
const model = await AutoModel.from_pretrained(folder, { dtype });
const inputs = tokenizer(JSON.parse(readFileSync(0, "utf-8")), { padding: true });
const { last_hidden_state } = await model(inputs);
const mask = inputs.attention_mask.tolist().map((row) => row.map(Number));
process.stdout.write(JSON.stringify({ states: last_hidden_state.tolist(), mask }));
