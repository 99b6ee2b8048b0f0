"""Granite 4.0 H and Olmo-Hybrid in other runtimes: Transformers.js in node, and onnxruntime-genai."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from checkpoints import gold_tokens, prompts
from clients import PRECISIONS, case, up_to_end
from node import needs_node
from optimum.exporters.onnx import main_export
from test_genai import PAD, make_generator, new_tokens
from test_node import ask

from benchmarks.checkpoint import add_tokenizer


og = pytest.importorskip(
    "onnxruntime_genai", reason="onnxruntime-genai is not installed: pip install onnxruntime-genai"
)
# A release for each: transformers 4 has no Olmo-Hybrid.
GRANITE = pytest.param("granite", marks=pytest.mark.once)
NEW = 24
ROWS = (9, 1, 30)


@pytest.fixture
def golds(gold_model):
    def golds(name: str) -> list[list[int]]:
        return [up_to_end(gold_tokens(gold_model(name), row, NEW)) for row in prompts(list(ROWS))]

    return golds


@needs_node
@pytest.mark.parametrize("name", [GRANITE, "olmo"])
def test_transformers_js(name, hybrid_folder, golds, plain):
    """It finds the caches by the names of layers in config.json. Rows are padded on the left."""
    folder, rows, expected = hybrid_folder(name), [row.tolist() for row in prompts(list(ROWS))], golds(name)
    asked = {"dtype": "fp32", "max_new_tokens": NEW}
    ids = rows[2] + expected[2]
    cases = {"alone": case("continue", rows=[rows[0]], **asked), "batch": case("continue", rows=rows, **asked)}
    cases |= {dtype: case("logits", dtype=dtype, ids=ids) for dtype in ("fp16", "q8", "q4")}
    answers = ask(folder, cases)
    assert answers["alone"] == expected[:1]
    assert [up_to_end(row) for row in answers["batch"]] == expected
    for dtype in ("fp16", "q8", "q4"):
        precision = PRECISIONS[dtype]
        own = plain(folder / precision.file).logits(ids)
        np.testing.assert_allclose(np.array(answers[dtype]), own, atol=precision.rounded, rtol=0)


@pytest.mark.parametrize(("name", "names"), [pytest.param("granite", "hub", marks=pytest.mark.once), ("olmo", "genai")])
def test_genai(name, names, checkpoint, golds, tmp_path):
    """Rows alone, a batch that is padded on the right, and a text that goes on."""
    source = add_tokenizer(shutil.copytree(checkpoint(name), tmp_path / "checkpoint"))
    main_export(str(source), tmp_path / "out", do_validation=False, model_kwargs={"cache_names": names})
    model, rows, expected = og.Model(str(tmp_path / "out")), prompts(list(ROWS)), golds(name)

    def answers(generator, columns: int, count: int) -> list[list[int]]:
        for _ in range(NEW):
            if generator.is_done():
                break
            generator.generate_next_token()
        return [up_to_end(new_tokens(generator, row, columns)) for row in range(count)]

    for row, gold in zip(rows, expected, strict=True):
        generator = make_generator(model)
        generator.append_tokens(row.tolist())
        assert answers(generator, len(row), 1) == [gold]
    batch = torch.full((len(rows), max(ROWS)), PAD)
    for i, row in enumerate(rows):
        batch[i, : len(row)] = row
    generator = make_generator(model, len(rows))
    generator.append_tokens(batch.numpy().astype(np.int32))
    assert answers(generator, max(ROWS), len(rows)) == expected
    generator = make_generator(model)
    generator.append_tokens(rows[2][:11].tolist())
    generator.append_tokens(rows[2][11:].tolist())
    assert answers(generator, len(rows[2]), 1) == [expected[2]]


def test_olmo_under_the_hubs_names_is_not_for_genai(hybrid_folder):
    """onnxruntime-genai takes one conv state a layer, and the Hub's Olmo-Hybrid has three."""
    assert not (hybrid_folder("olmo") / "genai_config.json").exists()
