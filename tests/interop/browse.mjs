// Use the chat page in headless Chromium as a person would: node browse.mjs CHROMIUM FOLDER < job > result, both JSON.
//
// The job is {url, gpu, chat, prompts, cases}. `gpu` is a key of GPU below. `chat` has messages that are typed one after
// the other. `prompts` has chats whose answers are returned as token ids. `cases` has questions for cases.mjs.
// The browser's profile and the screenshots go to FOLDER.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { fileURLToPath } from "node:url";

const require = createRequire(new URL("../../examples/web/package.json", import.meta.url));
const { chromium } = require("playwright-core");

const FLAGS = [
  "--no-sandbox", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update",
  "--disable-sync",
];
const GPU = {
  none: ["--disable-gpu"],
  // The CPU computes WebGPU. This is slow, and the same on every machine.
  software: ["--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan", "--use-angle=swiftshader"],
};
const DESKTOP = { width: 900, height: 700 };
const PHONE = { width: 360, height: 640 };

const [executablePath, folder] = process.argv.slice(2);
const { url, gpu, chat, prompts, cases } = JSON.parse(readFileSync(0, "utf-8"));

const context = await chromium.launchPersistentContext(`${folder}/profile`, {
  executablePath, args: [...FLAGS, ...GPU[gpu]], headless: true, viewport: DESKTOP,
});
try {
  const page = await context.newPage();
  page.setDefaultTimeout(120_000);
  const errors = [];
  const requests = [];
  page.on("pageerror", (error) => errors.push(String(error)));
  page.on("console", (message) => message.type() === "error" && errors.push(message.text()));
  context.on("request", (request) => requests.push(request.url()));

  // Record the messages that the page passes to the model. The answer alone would not show that a turn was lost.
  await page.addInitScript(() => {
    window.asked = [];
    const post = Worker.prototype.postMessage;
    Worker.prototype.postMessage = function (message, ...rest) {
      if (message[0] === "answer") window.asked.push(structuredClone(message[1]));
      return post.call(this, message, ...rest);
    };
  });
  await page.goto(url);
  const status = page.getByRole("status");
  await status.filter({ hasNotText: "Loading" }).waitFor();
  const result = { status: await status.textContent(), answers: [], speeds: [], pieces: [] };
  if (result.status.startsWith("Ready")) {
    for (const message of chat) {
      await page.evaluate(() => {
        window.seen = [];
        const look = () => window.seen.push(document.querySelector("li:last-child p").textContent);
        new MutationObserver(look).observe(document.getElementById("log"), { childList: true, subtree: true });
      });
      await page.getByLabel("Message").fill(message);
      await page.keyboard.press("Enter");
      await page.locator("#log[aria-busy=false] li.assistant").last().waitFor();
      result.answers.push(await page.locator("li.assistant p").last().textContent());
      result.speeds.push(await page.locator("#speed").textContent());
      result.pieces.push(new Set(await page.evaluate(() => window.seen)).size);
    }
    await page.screenshot({ path: `${folder}/desktop.png` });
    await page.setViewportSize(PHONE);
    await page.screenshot({ path: `${folder}/phone.png` });
    result.phoneWidth = await page.evaluate(() => document.documentElement.scrollWidth);
    result.asked = await page.evaluate(() => window.asked);
    result.isolated = await page.evaluate(() => crossOriginIsolated);
    result.ids = await page.evaluate(async (chats) => {
      const { answer, load } = await import("/lfm2.js");
      const loaded = await load({ dtype: "fp32", device: "wasm" });
      const all = [];
      for (const chat of chats) all.push((await answer(loaded, chat, { maxNewTokens: 48 })).ids);
      return all;
    }, prompts);
    const path = fileURLToPath(new URL("cases.mjs", import.meta.url));
    await page.route("**/cases.mjs", (route) => route.fulfill({ path, contentType: "text/javascript" }));
    result.cases = await page.evaluate(async (cases) => {
      await import("/lfm2.js"); // tells the library where the model is
      const { makeClient } = await import("/cases.mjs");
      const answer = await makeClient(await import("/library/transformers.min.js"), "model", "wasm");
      const all = [];
      for (const one of cases) all.push(await answer(one));
      return all;
    }, cases);
  }
  const origin = new URL(url).origin;
  const elsewhere = requests.filter((request) => !request.startsWith("data:") && !request.startsWith("blob:") &&
    new URL(request).origin !== origin);
  console.log(JSON.stringify({ ...result, errors, elsewhere }));
} finally {
  await context.close();
}
