"""LFM3 in other runtimes, as docs/lfm3.md says: onnxruntime-genai knows LFM2 alone."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from checkpoints import gold_tokens, prompts
from clients import case
from node import needs_node
from optimum.exporters.onnx import main_export
from test_node import ask

from benchmarks.checkpoint import add_tokenizer


NEW = 24


@pytest.fixture(scope="module")
def source(checkpoint, tmp_path_factory) -> Path:
    return add_tokenizer(shutil.copytree(checkpoint("lfm3"), tmp_path_factory.mktemp("lfm3") / "checkpoint"))


@pytest.fixture(scope="module")
def golds(gold_model) -> list[tuple[list[int], list[int]]]:
    return [(row.tolist(), gold_tokens(gold_model("lfm3"), row, NEW)) for row in prompts([9, 1, 30])]


def test_onnxruntime_genai_with_caches_that_grow(source, golds, tmp_path):
    og = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    from test_genai import make_generator, run

    main_export(str(source), tmp_path, do_validation=False, model_kwargs={"sliding_cache": "growing"})
    model = og.Model(str(tmp_path))
    for ids, tokens in golds:
        generator = make_generator(model)
        generator.append_tokens(ids)
        run(generator, NEW)
        assert generator.get_sequence(0)[len(ids) :].tolist() == tokens


def test_a_window_gets_no_genai_config(source, tmp_path):
    main_export(str(source), tmp_path, do_validation=False)
    assert not (tmp_path / "genai_config.json").exists()
    assert (tmp_path / "tokenizer.json").exists()


@needs_node
def test_transformers_js(source, golds, tmp_path):
    """Windows and all: it makes empty caches of the shapes that the graph declares."""
    main_export(str(source), tmp_path, do_validation=False)
    (tmp_path / "onnx").mkdir()
    for name in ("model.onnx", "model.onnx_data"):
        (tmp_path / name).rename(tmp_path / "onnx" / name)
    asked = {"dtype": "fp32", "max_new_tokens": NEW}
    cases = {len(ids): case("continue", rows=[ids], **asked) for ids, _ in golds}
    answers = ask(tmp_path, cases | {"batch": case("continue", rows=[ids for ids, _ in golds], **asked)})
    assert [answers[len(ids)][0] for ids, _ in golds] == answers["batch"] == [tokens for _, tokens in golds]
