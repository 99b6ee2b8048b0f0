// Use the chat page in headless Chromium as a person would: node browse.mjs CHROMIUM FOLDER < job > result, both JSON.
//
// The job has these fields. The browser's profile and the screenshots go to FOLDER.
//   url, gpu    the page, and a key of GPU below
//   hosts       what other hosts have: a folder or file for each beginning of an address
//   chat        messages that are typed one after the other
//   refused     a message whose pictures are no pictures
//   failing     a message that the model does not take
//   stopped     a message whose answer is stopped at once. It would have no end of its own
//   prompts     chats whose answers are returned as token ids, with the model's inputs and the counts of tokens read
//   cases       questions for cases.mjs
// A message is {text, pictures, how}. Each picture is {name, base64}, and `how` is a key of GIVE below.
import { existsSync, readFileSync } from "node:fs";
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
const { url, gpu, hosts, chat, refused, failing, stopped, prompts, cases } = JSON.parse(readFileSync(0, "utf-8"));

// Give pictures to the page. Playwright neither pastes nor drops files, so these events are made in the page.
const GIVE = {
  file: (page, pictures) =>
    page.locator("#file").setInputFiles(
      pictures.map(({ name, base64 }) => ({ name, mimeType: "image/png", buffer: Buffer.from(base64, "base64") })),
    ),
  paste: (page, pictures) => dispatch(page, pictures, "ClipboardEvent", "paste", "clipboardData"),
  drop: (page, pictures) => dispatch(page, pictures, "DragEvent", "drop", "dataTransfer"),
};

const dispatch = (page, pictures, type, name, field) =>
  page.evaluate(([pictures, type, name, field]) => {
    const data = new DataTransfer();
    for (const { name, base64 } of pictures) {
      data.items.add(new File([Uint8Array.from(atob(base64), (c) => c.charCodeAt(0))], name, { type: "image/png" }));
    }
    document.body.dispatchEvent(new window[type](name, { [field]: data, bubbles: true, cancelable: true }));
  }, [pictures, type, name, field]);

async function type(page, { text, pictures = [], how }) {
  if (pictures.length) {
    await GIVE[how](page, pictures);
    await page.locator(`#tray:has(button:nth-child(${pictures.length}))`).waitFor();
  }
  await page.getByLabel("Message").fill(text);
  await page.keyboard.press("Enter");
}

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
  for (const [start, place] of Object.entries(hosts)) {
    await context.route(`${start}**`, async (route) => {
      const path = place + decodeURIComponent(route.request().url().slice(start.length));
      const headers = { "access-control-allow-origin": "*" };
      await route.fulfill(existsSync(path) ? { path, headers } : { status: 404, headers });
    });
  }

  // Record the messages that the page passes to the model, and what that says it has read. The answer alone would not show
  // that a turn was lost, or read twice.
  await page.addInitScript(() => {
    window.asked = [];
    window.told = [];
    const post = Worker.prototype.postMessage;
    Worker.prototype.postMessage = function (message, ...rest) {
      if (message[0] === "load") this.addEventListener("message", ({ data }) => data.type === "answer" && window.told.push(data));
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
        const look = () => window.seen.push(document.querySelector("li:last-child p")?.textContent);
        new MutationObserver(look).observe(document.getElementById("log"), { childList: true, subtree: true });
      });
      await type(page, message);
      await page.locator("#log[aria-busy=false] li.assistant").last().waitFor();
      result.answers.push(await page.locator("li.assistant p").last().textContent());
      result.speeds.push(await page.locator("#speed").textContent());
      result.pieces.push(new Set(await page.evaluate(() => window.seen)).size);
    }
    result.takesPictures = await page.getByRole("button", { name: "Picture", exact: true }).isVisible();
    result.shown = await page.locator("li.user").evaluateAll((items) => items.map((li) => li.querySelectorAll("img").length));
    await page.screenshot({ path: `${folder}/desktop.png` });
    if (refused) {
      await GIVE[refused.how](page, refused.pictures);
      await page.getByRole("alert").filter({ hasText: /./ }).waitFor();
      result.refused = await page.getByRole("alert").textContent();
    }
    if (failing) {
      await type(page, failing);
      await page.getByRole("alert").filter({ hasText: /./ }).waitFor();
      result.failing = {
        alert: await page.getByRole("alert").textContent(),
        message: await page.getByLabel("Message").inputValue(),
        pictures: await page.locator("#tray img").count(),
        turns: await page.locator("#log li").count(),
      };
    }
    await page.setViewportSize(PHONE);
    await page.screenshot({ path: `${folder}/phone.png` });
    result.phoneWidth = await page.evaluate(() => document.documentElement.scrollWidth);
    result.asked = await page.evaluate(() => window.asked);
    result.told = await page.evaluate(() => window.told);
    result.isolated = await page.evaluate(() => crossOriginIsolated);
    [result.ids, result.inputs, result.read] = await page.evaluate(async (chats) => {
      if (chats.length === 0) return [[], [], []];
      const { answer, load, read } = await import("/lfm2.js");
      const loaded = await load({ dtype: "fp32", device: "wasm" });
      const decoded = ({ base64 }) => new Blob([Uint8Array.from(atob(base64), (c) => c.charCodeAt(0))], { type: "image/png" });
      const plain = ({ type, dims, data }) => ({ type, dims, data: Array.from(data, Number) });
      const ids = [];
      const inputs = [];
      const counts = [];
      for (const turns of chats) {
        const chat = turns.map((turn) => (turn.pictures ? { ...turn, pictures: turn.pictures.map(decoded) } : turn));
        const found = await answer(loaded, chat, { maxNewTokens: 48 });
        ids.push(found.ids);
        counts.push(found.read);
        const tensors = Object.entries(await read(loaded, chat)).filter(([, tensor]) => tensor.dims);
        inputs.push(Object.fromEntries(tensors.map(([name, tensor]) => [name, plain(tensor)])));
      }
      return [ids, inputs, counts];
    }, prompts);
    const path = fileURLToPath(new URL("cases.mjs", import.meta.url));
    await page.route("**/cases.mjs", (route) => route.fulfill({ path, contentType: "text/javascript" }));
    result.cases = await page.evaluate(async (cases) => {
      if (cases.length === 0) return [];
      const { open } = await import("/lfm2.js");
      const { makeClient } = await import("/cases.mjs");
      const { library, name } = await open();
      const answer = await makeClient(library, name, "wasm");
      const all = [];
      for (const one of cases) all.push(await answer(one));
      return all;
    }, cases);
    if (stopped) {
      await page.route("**/model/*config.json", async (route) => {
        const json = await (await route.fetch()).json();
        await route.fulfill({ json: { ...json, eos_token_id: null } });
      });
      await page.goto(url);
      await status.filter({ hasText: "Ready" }).waitFor();
      await type(page, stopped);
      await page.getByRole("button", { name: "Stop" }).dispatchEvent("click");
      await page.locator("#log[aria-busy=false] li.assistant").waitFor();
      result.stopped = await page.locator("li.assistant p").textContent();
    }
  }
  const origin = new URL(url).origin;
  const elsewhere = requests.filter((request) => !request.startsWith("data:") && !request.startsWith("blob:") &&
    new URL(request).origin !== origin);
  console.log(JSON.stringify({ ...result, errors, elsewhere }));
} finally {
  await context.close();
}
