"""A server of exported models in a thread, and what its clients do."""

from __future__ import annotations

import http.client
import json
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from optimum_lfm2.compat import TRANSFORMERS_5


if not TRANSFORMERS_5:
    pytest.skip("the server is transformers 5.24's", allow_module_level=True)
pytest.importorskip("fastapi")
openai = pytest.importorskip("openai")
import uvicorn  # noqa: E402

from optimum_lfm2.runtime.scheduler import Limits  # noqa: E402
from optimum_lfm2.serving.server import Bounds, Settings, build_app  # noqa: E402


# As LFM2's: tools are listed in the system message, and their results are messages of a role of their own.
TEMPLATE = (
    "{{ bos_token }}{% if tools %}<|im_start|>system\nList of tools: {{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "{% for call in message['tool_calls'] or [] %}<|tool_call_start|>[{{ call['function']['name'] }}("
    "{% for name, value in call['function']['arguments'].items() %}{{ ', ' if not loop.first }}{{ name }}="
    "{{ value | tojson }}{% endfor %})]<|tool_call_end|>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QUESTION = [{"role": "user", "content": "What is 3 plus 4?"}]
STORY = [{"role": "user", "content": "Ben put the silver key next to the well. Tell me a story."}]
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
    },
}
CALL = "<|tool_call_start|>[weather(city=\"Paris\", days=2), weather(city='Rome')]<|tool_call_end|>"


def with_tool_tokens(export: Path, folder: Path) -> Path:
    """Copy an export and give it LFM2's tokens for tool calls, in the place of two that it never writes."""
    shutil.copytree(export, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (folder / name).read_text()
        for old, new in (("<|fim_pre|>", "<|tool_call_start|>"), ("<|fim_mid|>", "<|tool_call_end|>")):
            text = text.replace(old, new)
        settings = json.loads(text)
        settings.pop("chat_template", None)
        (folder / name).write_text(json.dumps(settings))
    return folder


@contextmanager
def serving(loaded, names=("tiny",), **settings) -> Iterator[tuple[str, object, uvicorn.Server]]:
    """Serve in a thread. Yield the address, the managers and the server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = {"host": "127.0.0.1", "port": port, "key": None, "body": 2**20, "bounds": Bounds(None, 256)}
    app, state = build_app(dict.fromkeys(names, loaded), Settings(**{**given, "limits": Limits(), **settings}))
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error"))
    thread = threading.Thread(target=server.run, name="uvicorn")
    thread.start()
    for _ in range(1200):
        if server.started:
            break
        time.sleep(0.05)
    try:
        yield f"http://127.0.0.1:{port}", state, server
    finally:
        server.should_exit = True
        thread.join(60)
        state.shutdown()


def ask(client, messages=QUESTION, **fields):
    return client.chat.completions.create(model="tiny", messages=messages, **{"max_tokens": 24, **fields})


def alone_tokens(loaded, messages, seed: int = 0, new: int = 24, **settings) -> list[int]:
    """The tokens of `generate`."""
    inputs = loaded.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    torch.manual_seed(seed)
    out = loaded.model.generate(**inputs, max_new_tokens=new, **{"do_sample": False, **settings})
    return out[0, inputs["input_ids"].shape[1] :].tolist()


def alone(loaded, messages, *args, **settings) -> str:
    """What `generate` says."""
    return loaded.tokenizer.decode(alone_tokens(loaded, messages, *args, **settings), skip_special_tokens=True)


def streamed(events) -> str:
    return "".join(event.choices[0].delta.content or "" for event in events)


def post(address: str, path: str, body: object, headers: dict | None = None, method: str = "POST"):
    """Return the status and the body of an answer."""
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=120)
    data = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
    connection.request(method, path, data, {"Content-Type": "application/json", **(headers or {})})
    answer = connection.getresponse()
    return answer.status, answer.read().decode()
