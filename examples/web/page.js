// The chat page. Its state is the list of turns. The model runs in a worker.
const element = (id) => document.getElementById(id);
const [log, form, prompt, send, status, bar, speed] =
  ["log", "form", "prompt", "send", "status", "bar", "speed"].map(element);
const query = new URLSearchParams(location.search);
const worker = new Worker("/worker.js", { type: "module" });

let turns = [];
let bubble = null; // the element of the answer that is being written
let ready = false;
let failed = false; // after a failed load, other files may still report progress

const megabytes = (bytes) => (bytes / 1e6).toFixed(1);
const showSpeed = (value) => (speed.textContent = `${value.toFixed(1)} tokens/s`);

function showTurn(role, text) {
  const item = document.createElement("li");
  item.className = role;
  const who = document.createElement("span");
  who.className = "who";
  who.textContent = role === "user" ? "You" : "LFM2";
  const content = document.createElement("p");
  content.textContent = text;
  item.append(who, content);
  log.append(item);
  item.scrollIntoView({ block: "end" });
  return content;
}

function setBusy(busy) {
  send.disabled = busy || !ready;
  element("clear").disabled = busy || turns.length === 0;
  log.ariaBusy = String(busy);
  document.body.classList.toggle("busy", busy);
}

const handlers = {
  progress({ done, total }) {
    if (failed) return;
    bar.max = total;
    bar.value = done;
    status.textContent = `Loading: ${megabytes(done)} of ${megabytes(total)} MB`;
  },
  ready({ dtype, device, threads }) {
    ready = true;
    bar.hidden = true;
    const how = device === "webgpu" ? "WebGPU" : threads ? "WebAssembly" : "WebAssembly, one thread";
    status.textContent = `Ready: ${dtype}, ${how}`;
    prompt.disabled = false;
    prompt.focus();
    setBusy(false);
  },
  text({ piece, tokens, seconds }) {
    bubble.textContent += piece;
    bubble.scrollIntoView({ block: "end" });
    if (tokens > 0 && seconds > 0) showSpeed(tokens / seconds);
  },
  answer({ text, speed: measured }) {
    bubble.textContent = text;
    turns.push({ role: "assistant", content: text });
    if (measured !== null) showSpeed(measured);
    setBusy(false);
  },
  error({ message }) {
    failed = true;
    bar.hidden = true;
    status.textContent = message;
    status.classList.add("error");
    if (!ready) return;
    // Take the question out of the chat and put it back into the box, so that the user can ask again.
    bubble.closest("li").remove();
    log.lastElementChild.remove();
    prompt.value = turns.pop().content;
    setBusy(false);
  },
};

worker.onmessage = ({ data }) => handlers[data.type](data);
worker.onerror = (event) => handlers.error({ message: event.message ?? "The model's script did not load. Reload the page." });

form.addEventListener("submit", (event) => {
  event.preventDefault();
  const content = prompt.value.trim();
  if (send.disabled || content === "") return;
  prompt.value = "";
  turns.push({ role: "user", content });
  showTurn("user", content);
  bubble = showTurn("assistant", "");
  setBusy(true);
  worker.postMessage(["answer", turns]);
});

prompt.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    form.requestSubmit();
  }
});

element("clear").addEventListener("click", () => {
  turns = [];
  log.replaceChildren();
  speed.textContent = "";
  setBusy(false);
  prompt.focus();
});

worker.postMessage(["load", { dtype: query.get("dtype") ?? "fp32", device: query.get("device") }]);
