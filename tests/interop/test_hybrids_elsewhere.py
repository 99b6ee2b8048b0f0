"""Granite 4.0 H and Olmo-Hybrid in other runtimes: Transformers.js in node, and onnxruntime-genai."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import gold_tokens, prompts
from clients import PRECISIONS, case, up_to_end
from publishing import run
from test_genai import PAD, make_generator, new_tokens
from test_node import INSTALLED, ask

from benchmarks.checkpoint import add_tokenizer


og = pytest.importorskip(
    "onnxruntime_genai", reason="onnxruntime-genai is not installed: pip install onnxruntime-genai"
)
NEW = 24
ROWS = (9, 1, 30)


@pytest.fixture(scope="module")
def published(checkpoint, made_once):
    """`published(name, cache_names)` gives the folder of `export lfm2`, with the quality of each file in its card."""

    def published(name: str, names: str) -> Path:
        def make(place: Path) -> None:
            source = add_tokenizer(shutil.copytree(checkpoint(name), place / "checkpoint"))
            text = place / "text"
            text.write_text("qjxzvkqzxj" * 20)  # letters that make no longer token: the model has only 256 ids
            options = ("--precisions", "fp32", "fp16", "q4", "--cache-names", names, "--text", text, "--chunks", 2)
            assert run("--model", source, place / "out", *options, "--length", 32) == 0

        return made_once(f"hybrid-{name}-{names}", make) / "out"

    return published


@pytest.fixture
def golds(gold_model):
    def golds(name: str) -> list[list[int]]:
        return [up_to_end(gold_tokens(gold_model(name), row, NEW)) for row in prompts(list(ROWS))]

    return golds


@pytest.mark.skipif(not (shutil.which("node") and INSTALLED), reason="no node, or no node_modules")
@pytest.mark.parametrize("name", ["granite", "olmo"])
def test_transformers_js(name, published, golds, plain):
    """It finds the caches by the names of layers in config.json. Rows are padded on the left."""
    folder, rows = published(name, "hub"), [row.tolist() for row in prompts(list(ROWS))]
    asked = {"dtype": "fp32", "max_new_tokens": NEW}
    ids = rows[2] + golds(name)[2]
    cases = {"alone": case("continue", rows=[rows[0]], **asked), "batch": case("continue", rows=rows, **asked)}
    cases |= {dtype: case("logits", dtype=dtype, ids=ids) for dtype in ("fp16", "q4")}
    answers = ask(folder, cases)
    assert answers["alone"] == [golds(name)[0]]
    assert [up_to_end(row) for row in answers["batch"]] == golds(name)
    for dtype in ("fp16", "q4"):
        precision = PRECISIONS[dtype]
        expected = plain(folder / precision.file).logits(ids)
        np.testing.assert_allclose(np.array(answers[dtype]), expected, atol=precision.rounded, rtol=0)


@pytest.mark.parametrize(("name", "names"), [("granite", "hub"), ("granite", "genai"), ("olmo", "genai")])
def test_genai(name, names, published, golds):
    """Rows alone, a batch that is padded on the right, and a text that goes on."""
    model, rows = og.Model(str(published(name, names))), prompts(list(ROWS))

    def answers(generator, columns: int, count: int) -> list[list[int]]:
        for _ in range(NEW):
            if generator.is_done():
                break
            generator.generate_next_token()
        return [up_to_end(new_tokens(generator, row, columns)) for row in range(count)]

    for row, gold in zip(rows, golds(name), strict=True):
        generator = make_generator(model)
        generator.append_tokens(row.tolist())
        assert answers(generator, len(row), 1) == [gold]
    batch = torch.full((len(rows), max(ROWS)), PAD)
    for i, row in enumerate(rows):
        batch[i, : len(row)] = row
    generator = make_generator(model, len(rows))
    generator.append_tokens(batch.numpy().astype(np.int32))
    assert answers(generator, max(ROWS), len(rows)) == golds(name)
    generator = make_generator(model)
    generator.append_tokens(rows[2][:11].tolist())
    generator.append_tokens(rows[2][11:].tolist())
    assert answers(generator, len(rows[2]), 1) == [golds(name)[2]]


def test_olmo_under_the_hubs_names_is_not_for_genai(published):
    """onnxruntime-genai takes one conv state a layer, and the Hub's Olmo-Hybrid has three."""
    assert not (published("olmo", "hub") / "genai_config.json").exists()
