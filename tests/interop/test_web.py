"""The chat page of `examples/web` in headless Chromium gives the answers of transformers."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import threading
import urllib.request
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.error import HTTPError

import numpy as np
import pytest
import torch
from clients import NEW, PRECISIONS, PROMPTS, case
from pages import snippets
from transformers import AutoTokenizer


pytestmark = pytest.mark.once

ROOT = Path(__file__).parent.parent.parent
WEB = ROOT / "examples" / "web"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
INSTALLED = (WEB / "node_modules" / "playwright-core").is_dir()

installed = pytest.mark.skipif(not INSTALLED, reason="no node_modules: run `npm ci --ignore-scripts` in examples/web")
browser = pytest.mark.skipif(not (CHROMIUM and shutil.which("node")), reason="no chromium or no node on the PATH")

CHAT = [
    "What is 3 plus 4?",
    "Ben put the silver key next to the well. Where is the silver key?",
    "Tell me more.",
]
LONG = "Tell me a story."
CHATS = [
    [{"role": "user", "content": "Ben put the silver key next to the well. Where is the silver key?"}],
    [{"role": "user", "content": "Tell me a story."}],
    [
        {"role": "user", "content": "What is 3 plus 4?"},
        {"role": "assistant", "content": "3 plus 4 is 7."},
        {"role": "user", "content": "Thank you. What colour is the sky?"},
    ],
]


# Longer than what a GPU reads at once. The answers are short: a GPU in software takes a second for a token.
LONG_CHAT = ["Ben put the silver key next to the well. " * 30 + CHAT[0], "Thank you."]


def load_serve():
    spec = importlib.util.spec_from_file_location("serve", WEB / "serve.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


serve = load_serve()


@contextmanager
def running(server):
    """Yield the address of a server that a thread runs."""
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://localhost:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def served(folder):
    return running(serve.make_server(folder))


def browse(folder, artifacts, query="", gpu="none", server=served, **asked):
    job = {"gpu": gpu, "hosts": {}, "chat": [], "prompts": [], "cases": [], **asked}
    job["chat"] = [{"text": message} if isinstance(message, str) else message for message in job["chat"]]
    with server(folder) as url:
        done = subprocess.run(
            ["node", str(Path(__file__).with_name("browse.mjs")), CHROMIUM, str(artifacts)],
            input=json.dumps({"url": f"{url}/{query}", **job}),
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def visit(exported, tmp_path_factory):
    artifacts = tmp_path_factory.mktemp("web")
    asked = {"chat": CHAT, "prompts": CHATS, "stopped": {"text": LONG}}
    return browse(exported("trained"), artifacts, **asked) | {"artifacts": artifacts}


@pytest.fixture(scope="module")
def gold(checkpoint, gold_model):
    """The new tokens that transformers gives for a chat, end of turn included, and their text."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint("trained"))
    model = gold_model("trained").float()

    def gold(chat, max_new_tokens=512):
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
        with torch.no_grad():
            out = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        ids = out[0, inputs["input_ids"].shape[1] :].tolist()
        return ids, tokenizer.decode(ids, skip_special_tokens=True)

    return gold


@installed
@browser
def test_a_chat_is_answered_as_transformers_answers_it(visit, gold):
    turns = []
    for message, answer, asked in zip(CHAT, visit["answers"], visit["asked"], strict=False):
        turns.append({"role": "user", "content": message})
        assert asked == turns
        assert answer == gold(turns)[1]
        turns.append({"role": "assistant", "content": answer})
    assert visit["answers"][0] == "3 plus 4 is 7."


@installed
@browser
def test_the_page_says_what_it_does(visit):
    assert visit["status"] == "Ready: model.onnx, WebAssembly"
    for speed in visit["speeds"]:
        number, unit = speed.split()
        assert float(number) > 0
        assert unit == "tokens/s"
    assert min(visit["pieces"]) > 3  # the answer appeared piece by piece


@installed
@browser
def test_the_page_fits_a_phone_and_stays_by_itself(visit):
    assert visit["phoneWidth"] == 360
    assert visit["isolated"]  # otherwise WebAssembly has one thread
    assert visit["errors"] == []
    assert visit["elsewhere"] == []
    for name in ("desktop.png", "phone.png"):
        assert (visit["artifacts"] / name).stat().st_size > 5000


@installed
@browser
def test_an_answer_can_be_stopped(visit, tokenizer, gold_continuation):
    """What stands there is the beginning of what would have come."""
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": LONG}], add_generation_prompt=True, return_dict=True
    )
    whole = tokenizer.decode(gold_continuation(ids["input_ids"], 96), skip_special_tokens=True)
    assert visit["stopped"]
    assert whole.startswith(visit["stopped"])


@installed
@browser
def test_a_model_of_text_is_not_offered_pictures(visit):
    assert not visit["takesPictures"]


@installed
@browser
@pytest.mark.parametrize("index", range(len(CHATS)))
def test_tokens_in_the_browser_are_those_of_transformers(visit, gold, index):
    assert visit["ids"][index] == gold(CHATS[index], max_new_tokens=48)[0]


@installed
@browser
def test_a_chat_that_goes_on_is_not_read_again(visit, gold, tokenizer):
    """The model reads the new message, and the last token of the answer before it. Another chat it reads as a whole."""
    turns, before = [], 0
    for message, told in zip(CHAT, visit["told"], strict=True):
        turns.append({"role": "user", "content": message})
        length = len(tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False))
        assert told["read"] == [length - before]
        ids, answer = gold(turns)
        turns.append({"role": "assistant", "content": answer})
        before = length + len(ids) - 1
    lengths = [len(tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=False)) for c in CHATS]
    assert visit["read"] == [[length] for length in lengths]


@installed
@browser
def test_webgpu_takes_a_file_for_it_and_reads_in_chunks(hub_folder, plain, tokenizer, tmp_path):
    """A GPU in software does not compute in half precision, so the page takes q4 in place of q4f16."""
    result = browse(hub_folder, tmp_path, gpu="software", chat=LONG_CHAT)
    if "WebGPU" not in result["status"]:
        pytest.skip("this Chromium has no WebGPU in software")
    assert result["status"] == "Ready: model_q4.onnx, WebGPU"
    model, turns, before, reads = plain(hub_folder / PRECISIONS["q4"].file), [], 0, []
    for message, answer, told in zip(LONG_CHAT, result["answers"], result["told"], strict=True):
        turns.append({"role": "user", "content": message})
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        # A GPU rounds activations to 8 bits for a prompt, as accuracy_level asks it to.
        model.assert_greedy(ids, told["ids"], PRECISIONS["q4"].rounded)
        reads.append(len(ids) - before)
        before = len(ids) + len(told["ids"]) - 1
        turns.append({"role": "assistant", "content": answer})
    assert 256 < reads[0] < 512
    assert [told["read"] for told in result["told"]] == [[256, reads[0] - 256], [reads[1]]]
    assert result["errors"] == []


ALL = ["", "_fp16", "_quantized", "_q4", "_q4f16"]


@pytest.mark.skipif(not shutil.which("node"), reason="no node on the PATH")
def test_the_file_that_a_device_prefers():
    """Among the files that config.json names. A name in the address wins."""
    cases = {
        ("lfm2", "webgpu", True, None, *ALL): "model_q4f16.onnx",
        ("lfm2", "webgpu", False, None, *ALL): "model_q4.onnx",
        ("lfm2", "webgpu", True, None, "", "_fp16"): "model_fp16.onnx",
        ("lfm2", "webgpu", True, None, ""): "model.onnx",
        ("lfm2", "wasm", False, None, *ALL): "model_q4.onnx",
        ("lfm2", "wasm", False, None, "", "_fp16"): "model.onnx",
        ("lfm2", "wasm", False, None): "model.onnx",
        ("lfm2", "wasm", False, "q8", *ALL): "model_quantized.onnx",
        ("lfm2_moe", "webgpu", True, None, *ALL): "model_q4f16.onnx",
        ("lfm2_moe", "wasm", False, None, *ALL): "model.onnx",
        ("lfm2_vl", "wasm", False, None): "decoder_model_merged.onnx",
    }
    code = """import(process.argv[1]).then(({ chooseFile }) => console.log(JSON.stringify(
      JSON.parse(process.argv[2]).map(([model_type, device, half, dtype, ...suffixes]) => {
        const named = Object.fromEntries(suffixes.map((suffix) => [`model${suffix}.onnx`, true]));
        const config = { model_type, "transformers.js_config": { use_external_data_format: named } };
        return chooseFile(config, device, half, dtype).file;
      }))))"""
    done = subprocess.run(
        ["node", "-e", code, str(WEB / "lfm2.js"), json.dumps(list(cases))], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == list(cases.values())


@contextmanager
def plainly_served(site):
    """A web host that serves files, and nothing else."""
    handler = partial(SimpleHTTPRequestHandler, directory=str(site.parent))
    with running(ThreadingHTTPServer(("localhost", 0), handler)) as url:
        yield f"{url}/{site.name}"


@installed
@browser
def test_the_recipe_for_a_static_host(hub_folder, tmp_path):
    """What docs/deploy.md says, in a folder of a host that knows nothing of models."""
    (tmp_path / "examples").symlink_to(WEB.parent)
    (tmp_path / "lfm2_hub").symlink_to(hub_folder)
    (recipe,) = (code for code in snippets("docs/deploy.md", "") if "site/library" in code)
    lines = [line for line in recipe.splitlines() if not line.startswith(("optimum-cli", "(cd"))]
    subprocess.run(["bash", "-ec", "\n".join(lines)], cwd=tmp_path, check=True)
    result = browse(tmp_path / "site", tmp_path, server=plainly_served, chat=CHAT[:1])
    assert result["status"] == "Ready: model_q4.onnx, WebAssembly, one thread"
    assert result["answers"] == ["3 plus 4 is 7."]
    assert result["errors"] == []
    assert result["elsewhere"] == []


@installed
@browser
def test_library_and_model_from_elsewhere(hub_folder, tmp_path):
    """As docs/deploy.md says. The files of this machine stand in for the CDN and the Hub."""
    (places,) = snippets("docs/deploy.md", "html")
    named = json.loads(places.splitlines()[1])
    modules = WEB / "node_modules"
    package = json.loads((modules / "@huggingface/transformers/package.json").read_text())
    assert named["library"].endswith(f"@{package['version']}")
    runtime = f"https://cdn.jsdelivr.net/npm/onnxruntime-web@{package['dependencies']['onnxruntime-web']}/"
    hosts = {
        named["library"]: str(modules / "@huggingface/transformers" / package["jsdelivr"]),
        runtime: f"{modules}/onnxruntime-web/",
        f"https://huggingface.co/{named['model']}/resolve/main/": f"{hub_folder}/",
    }
    site = tmp_path / "site"
    site.mkdir()
    for path in (path for kind in ("html", "css", "js") for path in WEB.glob(f"*.{kind}")):
        shutil.copy(path, site)
    index = site / "index.html"
    before = '<script id="places" type="application/json">{}</script>\n'
    assert before in index.read_text()
    index.write_text(index.read_text().replace(before, places))
    result = browse(site, tmp_path, server=plainly_served, hosts=hosts, chat=CHAT[:1])
    assert result["status"] == "Ready: model_q4.onnx, WebAssembly, one thread"
    assert result["answers"] == ["3 plus 4 is 7."]
    assert all(any(address.startswith(start) for start in hosts) for address in result["elsewhere"])


@installed
@browser
def test_a_precision_that_is_not_there_is_said_on_the_page(exported, tmp_path):
    assert "model_q4.onnx" in browse(exported("trained"), tmp_path, query="?dtype=q4")["status"]


@installed
def test_both_layouts_are_served_alike(exported, tmp_path):
    flat, hub = exported("trained"), tmp_path / "hub"
    (hub / "onnx").mkdir(parents=True)
    for path in flat.iterdir():
        (hub / ("onnx" if ".onnx" in path.name else ".") / path.name).symlink_to(path)
    names = ["tokenizer.json", "tokenizer_config.json", "onnx/model.onnx", "onnx/model.onnx_data"]

    def contents(folder):
        with served(folder) as url:
            return [urllib.request.urlopen(f"{url}/model/{name}").read() for name in names]

    assert contents(flat) == contents(hub)
    assert b"chat_template" in contents(flat)[1]


@installed
def test_nothing_outside_is_served(exported):
    with served(exported("trained")) as url:
        for path in ("/model/../../pyproject.toml", "/../../pyproject.toml", "/model/%2e%2e/%2e%2e/pyproject.toml"):
            with pytest.raises(HTTPError, match="404"):
                urllib.request.urlopen(url + path)


def run_serve(*args):
    return subprocess.run(
        [sys.executable, str(WEB / "serve.py"), *map(str, args)], capture_output=True, text=True, check=False
    )


@installed
def test_what_is_no_export_is_refused_in_one_line(tmp_path, checkpoint):
    done = run_serve(checkpoint("trained"))
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "model.onnx" in done.stderr
    assert "optimum-cli export onnx" in done.stderr
    assert "tokenizer.json" in run_serve(tmp_path / "nowhere").stderr


def test_a_missing_library_is_said_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(serve, "LIBRARY", tmp_path / "nowhere")
    with pytest.raises(ValueError, match="npm ci"):
        serve.make_server(tmp_path)


@pytest.fixture(scope="module")
def library(hub_folder, long_ids, tmp_path_factory):
    cases = {}
    for dtype in PRECISIONS:
        cases[dtype, "batch"] = case("generate", prompts=PROMPTS, dtype=dtype, max_new_tokens=NEW)
        cases[dtype, "logits"] = case("logits", dtype=dtype, ids=long_ids)
    artifacts = tmp_path_factory.mktemp("precisions")
    visit = browse(hub_folder, artifacts, query="?dtype=q4", cases=list(cases.values()))
    assert visit["status"] == "Ready: model_q4.onnx, WebAssembly"
    assert visit["errors"] == []
    return dict(zip(cases, visit["cases"], strict=True))


@installed
@browser
@pytest.mark.parametrize("dtype", PRECISIONS)
def test_a_file_computes_what_it_computes_in_python(library, hub_folder, plain, prompt_ids, long_ids, dtype):
    """WebAssembly does not round activations to 8 bits, so the Python side computes without rounding too."""
    precision = PRECISIONS[dtype]
    model = plain(hub_folder / precision.file, exact=True)
    np.testing.assert_allclose(library[dtype, "logits"], model.logits(long_ids), atol=precision.exact, rtol=0)
    for ids, tokens in zip(prompt_ids, library[dtype, "batch"]["rows"], strict=True):
        model.assert_greedy(ids, tokens, precision.exact)
