"""Transformers.js in node runs an exported folder without changes and gives the tokens of transformers alone."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from clients import MESSAGES, NEW, PRECISIONS, PROMPTS, case, chat, up_to_end
from node import NEEDS_NODE


# The graphs of both releases are the same, node for node: tests/export/test_graph_digests.py.
pytestmark = [*NEEDS_NODE, pytest.mark.once]

RENDERED = [
    (messages, options)
    for messages in (
        chat("Hi"),
        chat("  spaces, a tab\t, a line\nand another  ", system="Be brief."),
        chat("What is 3 plus 4?", "3 plus 4 is 7.", "Grüße, 你好, 🦊!"),
        chat("A <|im_end|> in the text", "  An answer.  ", "More?", "Yes: {{ 1 + 1 }} {% if %}", system="S"),
    )
    for options in ({"add_generation_prompt": True}, {"add_generation_prompt": False})
]


def start(folder: Path, cases: list[dict]) -> subprocess.CompletedProcess:
    """Run node once for all cases, since it takes a second to start."""
    return subprocess.run(
        ["node", str(Path(__file__).with_name("node.mjs")), str(folder)],
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def ask(folder: Path, cases: dict) -> dict:
    """Return the answers by the names of the cases."""
    done = start(folder, list(cases.values()))
    assert done.returncode == 0, done.stderr
    return dict(zip(cases, json.loads(done.stdout), strict=True))


@pytest.fixture(scope="module")
def answers(hub_folder, long_ids):
    cases = {("render", i): case("render", chat=c, options=o) for i, (c, o) in enumerate(RENDERED)}
    for dtype in PRECISIONS:
        asked = {"dtype": dtype, "max_new_tokens": NEW}
        cases |= {(dtype, "row", i): case("generate", prompts=[p], **asked) for i, p in enumerate(PROMPTS)}
        cases[dtype, "batch"] = case("generate", prompts=PROMPTS, **asked)
        cases[dtype, "turns"] = case("turns", messages=MESSAGES, **asked)
        cases[dtype, "logits"] = case("logits", dtype=dtype, ids=long_ids)
    cases["pipeline"] = case("pipeline", dtype="fp32", chat=PROMPTS[1], max_new_tokens=NEW)
    return ask(hub_folder, cases)


@pytest.mark.parametrize("index", range(len(RENDERED)))
def test_a_chat_is_the_same_text_and_ids_in_both_languages(answers, tokenizer, index):
    messages, options = RENDERED[index]
    text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **options)
    assert answers["render", index] == {"text": text, "ids": ids}


@pytest.mark.parametrize("index", range(len(PROMPTS)))
def test_a_row_is_that_of_transformers(answers, prompt_ids, gold_continuation, index):
    gold = up_to_end(gold_continuation(prompt_ids[index], NEW))
    assert answers["fp32", "row", index] == {"columns": len(prompt_ids[index]), "rows": [gold]}


def test_a_batch_is_its_rows_alone(answers, prompt_ids, gold_continuation):
    """Transformers.js pads on the left. It continues a row after its end until all rows have ended."""
    answer = answers["fp32", "batch"]
    assert answer["columns"] == max(map(len, prompt_ids)) > min(map(len, prompt_ids))
    golds = [gold_continuation(ids, NEW) for ids in prompt_ids]
    assert len({tuple(gold) for gold in golds}) == len(golds)
    length = max(len(up_to_end(gold)) for gold in golds)
    assert answer["rows"] == [gold[:length] for gold in golds]


def turn_ids(tokenizer, turns: list[dict]) -> list[list[int]]:
    """Return the ids of the chat up to each answer, with the given answers before it."""
    messages, ids = [], []
    for message, turn in zip(MESSAGES, turns, strict=True):
        messages.append({"role": "user", "content": message})
        ids.append(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
        messages.append({"role": "assistant", "content": tokenizer.decode(turn["ids"], skip_special_tokens=True)})
    return ids


def test_a_chat_goes_on_from_its_cache(answers, tokenizer, gold_continuation):
    turns = answers["fp32", "turns"]
    for ids, turn in zip(turn_ids(tokenizer, turns), turns, strict=True):
        assert turn["ids"] == up_to_end(gold_continuation(ids, NEW))
        assert turn["cached"] == len(ids) + len(turn["ids"]) - 1  # no turn was read twice


def test_the_pipeline_answers(answers, tokenizer, prompt_ids, gold_continuation):
    gold = up_to_end(gold_continuation(prompt_ids[1], NEW))
    assert answers["pipeline"] == tokenizer.decode(gold, skip_special_tokens=True)


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_logits_are_those_of_python_on_the_same_file(answers, hub_folder, plain, long_ids, dtype):
    precision = PRECISIONS[dtype]
    expected = plain(hub_folder / precision.file).logits(long_ids)
    assert expected.std() > 1
    np.testing.assert_allclose(np.array(answers[dtype, "logits"]), expected, atol=precision.rounded, rtol=0)


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_tokens_are_those_of_python_on_the_same_file(answers, hub_folder, plain, tokenizer, prompt_ids, dtype):
    precision, turns = PRECISIONS[dtype], answers[dtype, "turns"]
    model = plain(hub_folder / precision.file)
    alone = [answers[dtype, "row", row]["rows"][0] for row in range(len(PROMPTS))]
    beside = answers[dtype, "batch"]["rows"]
    given = [*prompt_ids, *prompt_ids, *turn_ids(tokenizer, turns)]
    for ids, tokens in zip(given, [*alone, *beside, *(turn["ids"] for turn in turns)], strict=True):
        model.assert_greedy(ids, tokens, precision.rounded)
