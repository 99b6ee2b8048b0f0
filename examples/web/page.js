// The chat page. Its state is the list of turns. The model runs in a worker.
const element = (id) => document.getElementById(id);
const [log, form, prompt, send, stop, status, bar, speed, file, tray, notice] =
  ["log", "form", "prompt", "send", "stop", "status", "bar", "speed", "file", "tray", "notice"].map(element);
const query = new URLSearchParams(location.search);
const worker = new Worker(new URL("./worker.js", import.meta.url), { type: "module" });

let turns = [];
let chosen = []; // the pictures of the next turn
let takesPictures = false;
let bubble = null; // the element of the answer that is being written
let ready = false;
let failed = false; // after a failed load, other files may still report progress

const megabytes = (bytes) => (bytes / 1e6).toFixed(1);
const showSpeed = (value) => (speed.textContent = `${value.toFixed(1)} tokens/s`);

function pictureOf(blob) {
  const picture = document.createElement("img");
  picture.src = URL.createObjectURL(blob);
  picture.onload = () => URL.revokeObjectURL(picture.src);
  picture.alt = blob.name ?? "A picture";
  return picture;
}

function showTurn(role, text, pictures = []) {
  const item = document.createElement("li");
  item.className = role;
  const who = document.createElement("span");
  who.className = "who";
  who.textContent = role === "user" ? "You" : "LFM2";
  const content = document.createElement("p");
  content.textContent = text;
  item.append(who, ...pictures.map(pictureOf), content);
  log.append(item);
  item.scrollIntoView({ block: "end" });
  return content;
}

/** Add pictures to the next turn. One that the browser cannot decode is told of. */
async function choose(files) {
  notice.textContent = "";
  for (const blob of files) {
    try {
      (await createImageBitmap(blob)).close();
      chosen.push(blob);
    } catch {
      notice.textContent = `${blob.name} cannot be read as a picture. Choose a PNG, JPEG or WebP file.`;
    }
  }
  showChosen();
}

function showChosen() {
  const remove = (blob) => {
    const button = document.createElement("button");
    button.type = "button";
    button.ariaLabel = `Remove ${blob.name ?? "the picture"}`;
    button.append(pictureOf(blob));
    button.onclick = () => {
      chosen = chosen.filter((other) => other !== blob);
      showChosen();
    };
    return button;
  };
  tray.replaceChildren(...chosen.map(remove));
}

function setBusy(busy) {
  send.disabled = busy || !ready;
  send.hidden = busy;
  stop.hidden = !busy;
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
  ready({ file, device, pictures, threads }) {
    ready = true;
    takesPictures = pictures;
    element("add").hidden = !pictures;
    bar.hidden = true;
    const how = device === "webgpu" ? "WebGPU" : threads ? "WebAssembly" : "WebAssembly, one thread";
    status.textContent = `Ready: ${file}, ${how}`;
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
    if (!ready) {
      failed = true;
      bar.hidden = true;
      status.textContent = message;
      status.classList.add("error");
      return;
    }
    notice.textContent = message;
    // Take the question out of the chat and put it back into the box, so that the user can ask again.
    bubble.closest("li").remove();
    log.lastElementChild.remove();
    const { content, pictures = [] } = turns.pop();
    prompt.value = content;
    chosen = pictures;
    showChosen();
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
  notice.textContent = "";
  turns.push({ role: "user", content, ...(chosen.length && { pictures: chosen }) });
  showTurn("user", content, chosen);
  chosen = [];
  showChosen();
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

stop.addEventListener("click", () => worker.postMessage(["stop"]));

element("add").addEventListener("click", () => file.click());
file.addEventListener("change", () => {
  choose([...file.files]);
  file.value = ""; // the same file may be chosen again
});
for (const [kind, source] of [["paste", "clipboardData"], ["drop", "dataTransfer"]]) {
  document.addEventListener(kind, (event) => {
    const files = [...event[source].files];
    if (!takesPictures || files.length === 0) return;
    event.preventDefault();
    choose(files);
  });
}
document.addEventListener("dragover", (event) => takesPictures && event.preventDefault()); // else nothing can be dropped

element("clear").addEventListener("click", () => {
  turns = [];
  log.replaceChildren();
  speed.textContent = "";
  setBusy(false);
  prompt.focus();
});

// The library is code, so a link to the page does not choose it.
const places = JSON.parse(element("places").textContent);
const asked = { dtype: query.get("dtype"), device: query.get("device"), model: query.get("model") ?? places.model };
worker.postMessage(["load", { ...places, ...asked }]);
