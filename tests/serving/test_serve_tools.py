"""Tool calls and grammars of `optimum-cli lfm2 serve`."""

from __future__ import annotations

import json

import pytest
import torch
from servers import CALL, QUESTION, STORY, TOOL, alone, ask, streamed

from optimum_lfm2.runtime.picking import Picker


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
