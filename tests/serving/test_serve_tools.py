"""Tool calls and grammars of `optimum-cli lfm2 serve`."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest
from pages import snippets
from servers import CALL, QUESTION, STORY, TOOL, alone, ask, openai, serving, streamed
from transformers import AutoTokenizer

from optimum_lfm2.runtime.picking import Picker


@pytest.fixture
def says(monkeypatch, loaded):
    """`says(text)` makes the next answers this text."""

    def says(text: str) -> None:
        ids = loaded.tokenizer(f"{text}<|im_end|>", add_special_tokens=False)["input_ids"]
        pick = Picker.pick

        def scripted(self, logits):
            logits = np.zeros_like(logits)
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
    for call, without in zip(chat[1]["tool_calls"], shown[1]["tool_calls"], strict=True):
        call["function"]["arguments"], without["function"]["arguments"] = "", {}  # as clients send a call without any
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


def test_the_snippet_of_the_page(served, loaded, monkeypatch, capsys):
    """The model calls the tool, and once it has the result, it says what it likes."""
    ids = loaded.tokenizer(f"{CALL}<|im_end|>", add_special_tokens=False)["input_ids"]
    pick = Picker.pick

    def calls_first(self, logits):
        if "sunny, 21 degrees" not in loaded.tokenizer.decode(self._text[: self._prompt]):
            logits = np.zeros_like(logits)
            logits[ids[self._length - self._prompt]] = 1
        return pick(self, logits)

    monkeypatch.setattr(Picker, "pick", calls_first)
    (code,) = snippets("docs/serving.md")
    names: dict = {}
    exec(code.replace("http://localhost:8000", served[0]).replace("lfm2_onnx", "tiny"), names)
    results = [message["content"] for message in names["chat"][2:]]
    assert results == ["Paris: sunny, 21 degrees", "Rome: sunny, 21 degrees"]
    assert capsys.readouterr().out.strip() not in ("", "None")


# A call that is demanded

CLOCK = {"type": "function", "function": {"name": "clock"}}
NEEDY = {
    "type": "function",
    "function": {
        "name": "walk",
        "parameters": {
            "type": "object",
            "properties": {
                "far": {"type": "boolean"},
                "where": {"enum": ["north", "south"]},
                "steps": {"$ref": "#/$defs/few"},
            },
            "required": ["where"],
            "$defs": {"few": {"type": "integer", "minimum": 1, "maximum": 9}},
        },
    },
}


def one_call(message):
    (call,) = message.tool_calls
    return call.function.name, json.loads(call.function.arguments)


def test_a_call_can_be_demanded(client):
    """The model was never shown a tool, and yet it calls one, with arguments that follow the schema."""
    demand = {"tools": [NEEDY, CLOCK], "tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 60}
    answer = ask(client, STORY, **demand)
    assert answer.choices[0].finish_reason == "tool_calls"
    name, arguments = one_call(answer.choices[0].message)
    assert name in ("walk", "clock")
    events = list(ask(client, STORY, stream=True, **demand))
    (streamed_call,) = [call.function for event in events for call in event.choices[0].delta.tool_calls or ()]
    assert (streamed_call.name, json.loads(streamed_call.arguments)) == (name, arguments)
    named = {"type": "function", "function": {"name": "walk"}}
    found = []
    for seed in range(6):
        choice = ask(client, STORY, **{**demand, "tool_choice": named}, temperature=3, seed=seed).choices[0]
        name, arguments = one_call(choice.message)
        assert name == "walk"
        assert arguments["where"] in ("north", "south")
        assert type(arguments.get("far", True)) is bool
        assert arguments.get("steps", 1) in range(1, 10)
        assert list(arguments) == [one for one in ("far", "where", "steps") if one in arguments]
        found.append(json.dumps(arguments))
    assert len(set(found)) > 2
    flat = {"type": "function", **NEEDY["function"]}
    said = client.responses.create(
        model="tiny", input="?", tools=[flat], tool_choice={"type": "function", "name": "walk"}, max_output_tokens=200
    )
    assert {one.name for one in said.output if one.type == "function_call"} == {"walk"}


# Reasoning, and calls in XML

XML_TEMPLATE = (
    "{{ bos_token }}{% if tools %}<|im_start|>system\n{{ tools | tojson }}\nWrite <tool_call><function=name>"
    "<parameter=name>value</parameter></function></tool_call>.<|im_end|>\n{% endif %}{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking | default(true) %}<think>\n"
    "{% endif %}{% endif %}"
)
XML_CALLS = (
    "Two cities.\n</think>\n\n<tool_call>\n<function=weather>\n<parameter=city>\nParis\n</parameter>\n"
    "<parameter=days>\n2\n</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=weather>\n<parameter=city>\n12\n</parameter>\n"
    "</function>\n</tool_call>"
)


@pytest.fixture(scope="module")
def thinker(folder, tmp_path_factory, loaded):
    """A client of a model that thinks first, and calls tools in XML."""
    place = tmp_path_factory.mktemp("thinker")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / name, place)
    (place / "chat_template.jinja").write_text(XML_TEMPLATE)
    own = dataclasses.replace(loaded, tokenizer=AutoTokenizer.from_pretrained(place))
    with serving(own) as (address, *_):
        yield openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=120)


def test_calls_in_xml_after_reasoning(thinker, says):
    says(XML_CALLS)
    expected = [("weather", {"city": "Paris", "days": 2}), ("weather", {"city": "12"})]
    choice = ask(thinker, tools=[TOOL], max_tokens=250).choices[0]
    assert choice.finish_reason == "tool_calls"
    calls = [(one.function.name, json.loads(one.function.arguments)) for one in choice.message.tool_calls]
    assert calls == expected, "values have the types of the schema"
    assert choice.message.reasoning_content == "Two cities."
    assert not choice.message.content
    deltas = [event.choices[0].delta for event in ask(thinker, tools=[TOOL], stream=True, max_tokens=250)]
    calls = [call.function for delta in deltas for call in delta.tool_calls or ()]
    assert [(one.name, json.loads(one.arguments)) for one in calls] == expected
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas).strip() == "Two cities."
    assert not "".join(delta.content or "" for delta in deltas).strip()


def test_a_schema_begins_after_the_reasoning(thinker, loaded, monkeypatch):
    """The answer is JSON, and what is thought before it is free."""
    ids = loaded.tokenizer("Hm, a fox.</think>", add_special_tokens=False)["input_ids"]
    pick = Picker.pick

    def thinks(self, logits):
        written = self._length - self._prompt
        if written < len(ids):
            logits = np.full_like(logits, -1.0)
            logits[ids[written]] = 10
        return pick(self, logits)

    monkeypatch.setattr(Picker, "pick", thinks)
    schema = {"type": "object", "properties": {"w": {"enum": ["fox", "bee"]}}, "required": ["w"]}
    schema["additionalProperties"] = False
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    message = ask(thinker, STORY, response_format=form, max_tokens=60).choices[0].message
    assert message.reasoning_content == "Hm, a fox."
    assert json.loads(message.content)["w"] in ("fox", "bee")
    monkeypatch.undo()
    plain = {"extra_body": {"chat_template_kwargs": {"enable_thinking": False}}, "max_tokens": 60}
    message = ask(thinker, STORY, response_format=form, **plain).choices[0].message
    assert json.loads(message.content)["w"] in ("fox", "bee")
    with pytest.raises(openai.BadRequestError, match="form of calls cannot be demanded"):
        ask(thinker, tools=[TOOL], tool_choice="required")
