"""The template by which transformers 5.24 reads answers, and where it is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from optimum_lfm2.sidecars.response_template import FIELD, TEMPLATE, XML_TEMPLATE, write_response_template


DEMO = Path(__file__).parents[2] / "demo" / "checkpoint"


@pytest.fixture
def folder(tmp_path) -> Path:
    """The files of a tokenizer that writes tool calls as LFM2 does."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (DEMO / name).read_text(encoding="utf-8")
        for old, new in (("<|fim_pre|>", "<|tool_call_start|>"), ("<|fim_mid|>", "<|tool_call_end|>")):
            text = text.replace(old, new)
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def written(folder: Path) -> dict:
    return json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))


def test_a_vocabulary_with_tool_calls_gets_the_template_and_keeps_the_rest(folder):
    before = written(folder)
    write_response_template(folder)
    assert written(folder) == {**before, FIELD: TEMPLATE}


def test_a_template_of_the_checkpoints_own_stays(folder):
    own = {**written(folder), FIELD: {"fields": {}}}
    (folder / "tokenizer_config.json").write_text(json.dumps(own), encoding="utf-8")
    write_response_template(folder)
    assert written(folder) == own


def test_other_vocabularies_stay_as_they_are(tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, tmp_path)
    before = (tmp_path / "tokenizer_config.json").read_bytes()
    write_response_template(tmp_path)
    assert (tmp_path / "tokenizer_config.json").read_bytes() == before
    (tmp_path / "tokenizer.json").unlink()
    write_response_template(tmp_path)  # a folder without a tokenizer


def test_a_chat_template_in_xml_tells_the_form(folder):
    (folder / "chat_template.jinja").write_text(
        "<tool_call><function=f><parameter=a>1</parameter></function></tool_call>"
    )
    write_response_template(folder)
    assert written(folder)[FIELD] == XML_TEMPLATE


CALLS = '<|tool_call_start|>[f(a=1), g(b="x", c=[1, 2])]<|tool_call_end|>'


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello.<|im_end|>", {"content": "Hello."}),
        ("<think>So.</think>Hello.<|im_end|>", {"reasoning_content": "So.", "content": "Hello."}),
        (f"{CALLS}<|im_end|>", {}),
        (f"I look. {CALLS}<|im_end|>", {"content": "I look."}),
    ],
)
def test_transformers_reads_answers_by_it(text, expected):
    parsing = pytest.importorskip("transformers.utils.chat_parsing")
    message = parsing.parse_response(text, TEMPLATE, prefix="<|im_start|>assistant\n")
    calls = [("f", {"a": 1}), ("g", {"b": "x", "c": [1, 2]})] if CALLS in text else None
    if calls:
        found = [(one["function"]["name"], one["function"]["arguments"]) for one in message.pop("tool_calls")]
        assert found == calls
    assert message == {"role": "assistant", **expected}
