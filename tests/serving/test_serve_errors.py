"""What `optimum-cli lfm2 serve` says to requests that are wrong, and when a model fails."""

from __future__ import annotations

import json
import threading

import pytest
from servers import QUESTION, STORY, TOOL, ask, openai, post

from optimum_lfm2.runtime.scheduler import Scheduler


CHATS = "/v1/chat/completions"
OTHER = {"type": "function", "function": {"name": "other"}}
UNNAMED = {"type": "function", "function": {"name": "a b"}}
ANY = {"type": "json_object"}


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        (CHATS, b"{", 400, "no JSON object"),
        (CHATS, b"[]", 400, "no JSON object"),
        (CHATS, b'{"messages": "\xfc"}', 400, "no JSON object"),
        (CHATS, b"[" * 10**5, 400, "no JSON object"),
        (CHATS, {}, 400, "messages has to be"),
        (CHATS, {"messages": "hello"}, 400, "messages has to be"),
        (CHATS, {"messages": [{"content": "x"}]}, 400, "role"),
        (CHATS, {"messages": [{"role": "user", "content": 3}]}, 400, "content"),
        (CHATS, {"messages": QUESTION, "model": "gpt"}, 404, "no model gpt. This server has tiny"),
        (CHATS, {"messages": QUESTION, "temperature": -1}, 400, "temperature is -1"),
        (CHATS, {"messages": QUESTION, "temperature": "hot"}, 400, "temperature is hot"),
        (CHATS, {"messages": QUESTION, "top_p": 2}, 400, "top_p"),
        (CHATS, {"messages": QUESTION, "max_tokens": 0}, 400, "max_tokens"),
        (CHATS, {"messages": QUESTION, "max_tokens": 300}, 400, "asks for 300 tokens"),
        (CHATS, {"messages": QUESTION, "n": 2}, 400, "n: this server cannot"),
        (CHATS, {"messages": QUESTION, "logprobs": True}, 400, "logprobs"),
        (CHATS, {"messages": QUESTION, "tool_choice": "required"}, 400, "there are no tools"),
        (CHATS, {"messages": QUESTION, "tools": [TOOL], "tool_choice": "maybe"}, 400, "tool_choice has to be"),
        (CHATS, {"messages": QUESTION, "tools": [TOOL], "tool_choice": OTHER}, 400, "tool_choice has to be"),
        (CHATS, {"messages": QUESTION, "tools": [UNNAMED], "tool_choice": "required"}, 400, "'a b' is no name"),
        (
            CHATS,
            {"messages": QUESTION, "tools": [TOOL], "tool_choice": "required", "response_format": ANY},
            400,
            "cannot both",
        ),
        (CHATS, {"messages": QUESTION, "nonsense": 1}, 400, "nonsense: no such field"),
        (CHATS, {"messages": QUESTION, "logit_bias": {"x": 1}}, 400, "logit_bias has to be"),
        (CHATS, {"messages": QUESTION, "logit_bias": {"7": float("nan")}}, 400, "logit_bias has to be"),
        (CHATS, {"messages": QUESTION, "logit_bias": {"2048": 1}}, 400, "logit_bias has the token 2048; this model's"),
        (CHATS, {"messages": QUESTION, "generation_config": "{"}, 400, "generation_config has to be"),
        (CHATS, {"messages": QUESTION, "generation_config": [3]}, 400, "generation_config has to be"),
        (CHATS, {"messages": QUESTION, "generation_config": {"beams": 3}}, 400, "beams is no setting"),
        (CHATS, {"messages": QUESTION, "generation_config": {"validate": 3}}, 400, "validate is no setting"),
        (CHATS, {"messages": QUESTION, "generation_config": {"num_return_sequences": 3}}, 400, "one answer"),
        (CHATS, {"messages": QUESTION, "stop": [1]}, 400, "stop has to be"),
        (CHATS, {"messages": QUESTION, "tools": [{}]}, 400, "tools has to be"),
        (CHATS, {"messages": QUESTION, "tools": 5}, 400, "tools has to be"),
        (CHATS, {"messages": QUESTION, "response_format": {"type": "xml"}}, 400, "response_format"),
        (
            CHATS,
            {"messages": QUESTION, "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 3}}}},
            400,
            "schema",
        ),
        (CHATS, {"messages": [{"role": "user", "content": "word " * 1100}]}, 400, "may be given"),
        (CHATS, {"messages": [{"role": "user", "content": "x" * 2**20}]}, 413, "more than"),
        (
            CHATS,
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
            400,
            "cannot be read",
        ),
        ("/v1/completions", {"prompt": ["a", "b"]}, 400, "prompt has to be a text"),
        ("/v1/completions", {"prompt": "a", "suffix": "b"}, 400, "suffix: this server cannot"),
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


def test_what_no_exported_graph_can_do_is_the_requests_fault(served):
    settings = {"num_beams": 2, "cache_implementation": "static"}
    found, text = post(served[0], CHATS, {"messages": QUESTION, "max_tokens": 3, "generation_config": settings})
    assert (found, "cannot be honoured" in text) == (400, True)
    assert post(served[0], CHATS, {"messages": QUESTION, "stream": "no"})[0] == 400


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
