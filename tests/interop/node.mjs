// Transformers.js in node: node node.mjs FOLDER < cases > answers, both JSON lists. FOLDER is laid out as on the Hub.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import path from "node:path";

import { makeClient } from "./cases.mjs";

const require = createRequire(new URL("../../examples/web/package.json", import.meta.url));
const library = require("@huggingface/transformers");

const folder = path.resolve(process.argv[2]);
library.env.allowRemoteModels = false;
library.env.localModelPath = path.dirname(folder);
const answer = await makeClient(library, path.basename(folder), "cpu");
const answers = [];
for (const one of JSON.parse(readFileSync(0, "utf-8"))) answers.push(await answer(one));
process.stdout.write(JSON.stringify(answers));
