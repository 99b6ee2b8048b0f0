"""`optimum-cli lfm2 serve`, as clients of OpenAI's API see it."""

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
from checkpoints import prompts

from optimum_lfm2.compat import TRANSFORMERS_5


if not TRANSFORMERS_5:
    pytest.skip("the server is transformers 5.24's", allow_module_level=True)
pytest.importorskip("fastapi")
openai = pytest.importorskip("openai")
import uvicorn  # noqa: E402

from optimum_lfm2.runtime.picking import Picker  # noqa: E402
from optimum_lfm2.runtime.scheduler import Limits, QueueFullError, Scheduler  # noqa: E402
from optimum_lfm2.serving.folder import load_folder  # noqa: E402
from optimum_lfm2.serving.server import Bounds, Settings, build_app, named  # noqa: E402


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


@pytest.fixture(scope="module")
def folder(exported, tmp_path_factory) -> Path:
    """The export with LFM2's tokens for tool calls, in the place of three that it never writes."""
    folder = shutil.copytree(exported("trained"), tmp_path_factory.mktemp("served") / "tiny")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (folder / name).read_text()
        for old, new in (("<|fim_pre|>", "<|tool_call_start|>"), ("<|fim_mid|>", "<|tool_call_end|>")):
            text = text.replace(old, new)
        settings = json.loads(text)
        settings.pop("chat_template", None)
        (folder / name).write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def loaded(folder):
    return load_folder(folder)


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


@pytest.fixture(scope="module")
def served(loaded):
    with serving(loaded) as running:
        yield running


@pytest.fixture(scope="module")
def client(served):
    return openai.OpenAI(base_url=f"{served[0]}/v1", api_key="none", max_retries=0, timeout=120)


def ask(client, messages=QUESTION, **fields):
    return client.chat.completions.create(model="tiny", messages=messages, **{"max_tokens": 24, **fields})


def alone(loaded, messages, seed: int = 0, new: int = 24, **settings) -> str:
    """What `generate` says."""
    inputs = loaded.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    torch.manual_seed(seed)
    out = loaded.model.generate(**inputs, max_new_tokens=new, **{"do_sample": False, **settings})
    return loaded.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def streamed(events) -> str:
    return "".join(event.choices[0].delta.content or "" for event in events)


def post(address: str, path: str, body: object, headers: dict | None = None, method: str = "POST"):
    """Return the status and the body of an answer."""
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=120)
    data = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
    connection.request(method, path, data, {"Content-Type": "application/json", **(headers or {})})
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


# Answers


def test_an_answer_streamed_and_not(client, loaded):
    gold = alone(loaded, QUESTION)
    answer = ask(client)
    assert answer.choices[0].message.content == gold == "3 plus 4 is 7."
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == len(loaded.tokenizer(gold, add_special_tokens=False)["input_ids"]) + 1
    assert streamed(ask(client, stream=True)) == gold
    assert ask(client, STORY, max_tokens=3).choices[0].finish_reason == "length"


def test_the_other_endpoints(client, served, loaded):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert post(served[0], "/health", None, method="GET") == (200, '{"status":"ok"}')
    prompt = "Once upon a time"
    ids = loaded.tokenizer(prompt, return_tensors="pt")["input_ids"]
    out = loaded.model.generate(ids, max_new_tokens=20, do_sample=False)[0, ids.shape[1] :]
    gold = loaded.tokenizer.decode(out, skip_special_tokens=True)
    fields = {"model": "tiny", "prompt": prompt, "max_tokens": 20}
    assert client.completions.create(**fields).choices[0].text == gold
    assert "".join(event.choices[0].text for event in client.completions.create(**fields, stream=True)) == gold
    said = client.responses.create(model="tiny", input=QUESTION[0]["content"], max_output_tokens=24)
    assert said.output_text == alone(loaded, QUESTION)
    events = client.responses.create(model="tiny", input=QUESTION[0]["content"], max_output_tokens=24, stream=True)
    assert [event.response.output_text for event in events if event.type == "response.completed"] == [said.output_text]


def test_settings_of_a_request(client, loaded):
    hot = {"temperature": 1.8, "top_p": 0.9, "seed": 7}
    gold = alone(loaded, STORY, seed=7, do_sample=True, temperature=1.8, top_p=0.9)
    assert ask(client, STORY, **hot).choices[0].message.content == gold != alone(loaded, STORY)
    assert streamed(ask(client, STORY, **hot, stream=True)) == gold
    assert ask(client, STORY, temperature=0).choices[0].message.content == alone(loaded, STORY)
    further = {"top_k": 5, "min_p": 0.05, "repetition_penalty": 1.4}
    gold = alone(loaded, STORY, seed=3, do_sample=True, temperature=1.5, **further)
    assert ask(client, STORY, temperature=1.5, seed=3, extra_body=further).choices[0].message.content == gold


def test_a_stop_string_is_left_out(client, loaded):
    gold = alone(loaded, QUESTION)
    for stop in (" is 7", [" is", "nowhere"], "us 4"):
        cut = gold[: min(place for one in ([stop] if isinstance(stop, str) else stop) if (place := gold.find(one)) > 0)]
        assert ask(client, stop=stop).choices[0].message.content == cut
        assert streamed(ask(client, stop=stop, stream=True)) == cut
    assert streamed(ask(client, stop="7. No", stream=True)) == gold  # begun and not completed


def test_beams_run_alone(client, loaded):
    config = json.dumps({"num_beams": 3, "eos_token_id": 7, "pad_token_id": 0, "do_sample": False})
    fields = {"extra_body": {"generation_config": config}, "max_tokens": 12}
    gold = alone(loaded, STORY, new=12, num_beams=3)
    assert ask(client, STORY, **fields).choices[0].message.content == gold
    assert streamed(ask(client, STORY, stream=True, **fields)) == gold


# Tools and grammars


@pytest.fixture
def says(monkeypatch, loaded):
    """`says(text)` makes the next answers this text."""

    def says(text: str) -> None:
        ids = loaded.tokenizer(f"{text}<|im_end|>", add_special_tokens=False)["input_ids"]
        pick = Picker.pick

        def scripted(self, logits):
            logits = torch.zeros_like(logits)
            logits[ids[self._length - self._prompt]] = 1
            return pick(self, logits)

        monkeypatch.setattr(Picker, "pick", scripted)

    return says


def test_a_tool_call_its_result_and_the_answer(client, loaded, says, monkeypatch):
    says(f"Let me see. {CALL}")
    answer = ask(client, tools=[TOOL], max_tokens=99)
    message = answer.choices[0].message
    assert answer.choices[0].finish_reason == "tool_calls"
    expected = [("weather", {"city": "Paris", "days": 2}), ("weather", {"city": "Rome"})]
    assert [(one.function.name, json.loads(one.function.arguments)) for one in message.tool_calls] == expected
    assert message.content.strip() == "Let me see."
    events = list(ask(client, tools=[TOOL], stream=True, max_tokens=99))
    calls = [call for event in events for call in event.choices[0].delta.tool_calls or ()]
    assert [(one.function.name, json.loads(one.function.arguments)) for one in calls] == expected
    assert [one.index for one in calls] == [0, 1]
    assert streamed(events).strip() == "Let me see."
    assert events[-1].choices[0].finish_reason == "tool_calls"
    called = client.responses.create(
        model="tiny", input="?", tools=[{"type": "function", **TOOL["function"]}], max_output_tokens=99
    )
    assert [one.name for one in called.output if one.type == "function_call"] == ["weather", "weather"]
    monkeypatch.undo()
    results = [{"role": "tool", "tool_call_id": one.id, "content": "sunny"} for one in message.tool_calls]
    chat = [*QUESTION, message.model_dump(exclude_none=True), *results]
    shown = [
        *QUESTION,
        {"role": "assistant", "content": "", "tool_calls": message.model_dump()["tool_calls"]},
        *results,
    ]
    for call in shown[1]["tool_calls"]:
        call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    assert ask(client, chat).choices[0].message.content == alone(loaded, shown)


@pytest.mark.parametrize(
    "text", ["<|tool_call_start|>[weather(city=]<|tool_call_end|>", "<|tool_call_start|>[weather("]
)
def test_a_call_that_is_none_is_no_error(text, client, says):
    says(text)
    answer = ask(client, tools=[TOOL], max_tokens=60)
    assert answer.choices[0].message.tool_calls is None
    assert answer.choices[0].finish_reason == "stop"
    assert list(ask(client, tools=[TOOL], stream=True, max_tokens=60))[-1].choices[0].finish_reason == "stop"


def test_an_answer_by_a_json_schema(client):
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer", "maximum": 99, "minimum": 0}, "w": {"enum": ["fox", "bee"]}},
        "required": ["n", "w"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    answer = ask(client, STORY, response_format=form, max_tokens=60)
    value = json.loads(answer.choices[0].message.content)
    assert set(value) == {"n", "w"}
    assert 0 <= value["n"] <= 99
    assert value["w"] in ("fox", "bee")
    assert (
        streamed(ask(client, STORY, response_format=form, max_tokens=60, stream=True))
        == answer.choices[0].message.content
    )
    assert ask(client, response_format={"type": "text"}).choices[0].message.content == "3 plus 4 is 7."


# Errors


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("/v1/chat/completions", b"{", 400, "no JSON object"),
        ("/v1/chat/completions", b"[]", 400, "no JSON object"),
        ("/v1/chat/completions", {}, 400, "messages has to be"),
        ("/v1/chat/completions", {"messages": "hello"}, 400, "messages has to be"),
        ("/v1/chat/completions", {"messages": [{"content": "x"}]}, 400, "role"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": 3}]}, 400, "content"),
        ("/v1/chat/completions", {"messages": QUESTION, "model": "gpt"}, 404, "no model gpt. This server has tiny"),
        ("/v1/chat/completions", {"messages": QUESTION, "temperature": -1}, 400, "temperature is -1"),
        ("/v1/chat/completions", {"messages": QUESTION, "temperature": "hot"}, 400, "temperature is hot"),
        ("/v1/chat/completions", {"messages": QUESTION, "top_p": 2}, 400, "top_p"),
        ("/v1/chat/completions", {"messages": QUESTION, "max_tokens": 0}, 400, "max_tokens"),
        ("/v1/chat/completions", {"messages": QUESTION, "max_tokens": 300}, 400, "asks for 300 tokens"),
        ("/v1/chat/completions", {"messages": QUESTION, "n": 2}, 400, "n: this server cannot"),
        ("/v1/chat/completions", {"messages": QUESTION, "logprobs": True}, 400, "logprobs"),
        ("/v1/chat/completions", {"messages": QUESTION, "tool_choice": "required"}, 400, "tool_choice"),
        ("/v1/chat/completions", {"messages": QUESTION, "nonsense": 1}, 400, "nonsense: no such field"),
        ("/v1/chat/completions", {"messages": QUESTION, "logit_bias": {"x": 1}}, 400, "logit_bias has to be"),
        ("/v1/chat/completions", {"messages": QUESTION, "stop": [1]}, 400, "stop has to be"),
        ("/v1/chat/completions", {"messages": QUESTION, "tools": [{}]}, 400, "tools has to be"),
        ("/v1/chat/completions", {"messages": QUESTION, "response_format": {"type": "xml"}}, 400, "response_format"),
        (
            "/v1/chat/completions",
            {"messages": QUESTION, "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 3}}}},
            400,
            "schema",
        ),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "word " * 1100}]}, 400, "may be given"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x" * 2**20}]}, 413, "more than"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
            400,
            "cannot be read",
        ),
        ("/v1/completions", {"prompt": ["a", "b"]}, 400, "prompt has to be a text"),
        ("/v1/responses", {"input": 3}, 400, "input has to be"),
        ("/v1/nowhere", {}, 404, "This server has /v1/chat/completions"),
        ("/reset", {}, 404, "This server has"),
        ("/load_model", {"model": "x"}, 404, "This server has"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_wrong_is_said_in_one_line(path, body, status, words, stream, served):
    if stream and isinstance(body, dict):
        body = {**body, "stream": True}
    found, text = post(served[0], path, body)
    error = json.loads(text)["error"]
    assert (found, error["type"]) == (status, "invalid_request_error")
    assert words in error["message"]
    assert "\n" not in error["message"]


def test_a_model_that_fails_harms_no_other_request(client, served, loaded, monkeypatch):
    run = Scheduler._give_tokens
    failing = threading.Event()

    def fail(self):
        if failing.is_set():
            failing.clear()
            raise RuntimeError('injected "error"')
        run(self)

    monkeypatch.setattr(Scheduler, "_give_tokens", fail)
    failing.set()
    with pytest.raises(openai.InternalServerError, match="injected"):
        ask(client, STORY)
    failing.set()
    with pytest.raises(openai.APIError):
        list(ask(client, STORY, stream=True))
    assert ask(client).choices[0].message.content == "3 plus 4 is 7."


# Many clients


def test_many_clients_get_what_each_gets_alone(client, loaded, served):
    texts = [loaded.tokenizer.decode(row) for row in prompts([5, 30, 9, 60, 2, 17, 40, 12], vocab_size=2000)]
    chats = [[{"role": "user", "content": text}] for text in texts]
    golds = [alone(loaded, chat) for chat in chats]
    found: dict[int, str] = {}

    def run(i: int) -> None:
        if i % 2:
            found[i] = streamed(ask(client, chats[i], stream=True))
        else:
            found[i] = ask(client, chats[i]).choices[0].message.content

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(chats))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert [found.get(i) for i in range(len(chats))] == golds


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_row(stream, served, monkeypatch):
    step = Scheduler.step
    monkeypatch.setattr(
        Scheduler, "step", lambda self: (step(self), time.sleep(0.1))
    )  # a slow machine has time to notice
    address, state, _ = served
    scheduler = state.managers["tiny"].engine.scheduler
    connection = http.client.HTTPConnection(address.removeprefix("http://"))
    fields = {"messages": STORY, "max_tokens": 250, "stream": stream, "temperature": 1.5}
    fields["logit_bias"] = {"7": -100}  # it does not end by itself
    connection.request("POST", "/v1/chat/completions", json.dumps(fields), {"Content-Type": "application/json"})
    if stream:
        connection.getresponse().read(100)
    for _ in range(600):
        if scheduler.running:
            break
        time.sleep(0.02)
    assert scheduler.running == 1
    running = scheduler._running[0] if scheduler._running else scheduler._reading[0]
    connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()
    for _ in range(1500):
        if scheduler.idle:
            break
        time.sleep(0.02)
    assert running.ended == "cancelled"


def test_a_full_queue_is_503(client, monkeypatch):
    def full(self, request):
        raise QueueFullError("2 requests wait already. Try again later.")

    monkeypatch.setattr(Scheduler, "submit", full)
    for stream in (False, True):
        with pytest.raises(openai.InternalServerError, match="2 requests wait") as refused:
            ask(client, stream=stream)
        assert refused.value.status_code == 503


def test_the_end_of_the_server_waits_for_what_runs(loaded):
    before = {thread.name for thread in threading.enumerate()}
    with serving(loaded, key="secret", names=("one", "two")) as (address, state, server):
        fields = {"model": "two", "messages": STORY, "max_tokens": 60, "stream": True}
        assert post(address, "/v1/chat/completions", fields)[0] == 401
        assert post(address, "/health", None, method="GET")[0] == 200
        key = {"Authorization": "Bearer secret"}
        assert post(address, "/v1/chat/completions", {"messages": STORY}, key)[0] == 404  # which of two?
        connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=120)
        connection.request(
            "POST", "/v1/chat/completions", json.dumps(fields), {"Content-Type": "application/json", **key}
        )
        answer = connection.getresponse()
        begun = answer.read(10)
        server.should_exit = True
        text = (begun + answer.read()).decode()
        assert text.endswith("data: [DONE]\n\n")
        assert '"finish_reason":' in text
        state.managers["two"].stop()
        assert state.managers["two"].engine.scheduler.idle
    assert not state.is_cb_alive()
    assert {thread.name for thread in threading.enumerate()} <= before | {"lfm2-engine"}  # of the other server


def test_the_name_of_a_folder(tmp_path):
    assert named(str(tmp_path / "a" / "lfm2_onnx")) == ("lfm2_onnx", tmp_path / "a" / "lfm2_onnx")
    assert named("small=/models/x") == ("small", Path("/models/x"))
    odd = tmp_path / "a=b"
    odd.mkdir()
    assert named(str(odd)) == ("a=b", odd)


# Pictures


def test_pictures_come_with_the_request(client):
    content = [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}, {"type": "text", "text": "?"}]
    with pytest.raises(openai.BadRequestError, match="None is fetched"):
        ask(client, [{"role": "user", "content": content}])
    content[0]["image_url"]["url"] = "data:image/png;base64,AAAA"
    with pytest.raises(openai.BadRequestError, match="takes no pictures"):
        ask(client, [{"role": "user", "content": content}])
