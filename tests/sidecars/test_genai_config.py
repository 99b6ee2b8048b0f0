"""onnxruntime-genai opens a folder whose checkpoint has no start token, or ids that no tokenizer has."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from optimum.exporters.onnx import main_export

from optimum_lfm2.sidecars.genai_config import GENAI_CONFIG, read_genai_config


og = pytest.importorskip(
    "onnxruntime_genai", reason="onnxruntime-genai is not installed: pip install onnxruntime-genai"
)

NAMES = ("bos_token_id", "eos_token_id", "pad_token_id")
IDS, NEW = [1, 50, 60, 70], 8


def generated(folder: Path) -> list[int]:
    model = og.Model(str(folder))
    params = og.GeneratorParams(model)
    params.set_search_options(do_sample=False, max_length=64)
    generator = og.Generator(model, params)
    generator.append_tokens(IDS)
    for _ in range(NEW):
        generator.generate_next_token()
    return generator.get_sequence(0).tolist()


@pytest.fixture(scope="module")
def expected(exported):
    return generated(exported("trained"))


def export_with(checkpoint: Path, tmp_path: Path, config: dict, generation: dict | None) -> Path:
    """Export a checkpoint with other special tokens in its two files; without the second where that is None."""
    source = shutil.copytree(checkpoint, tmp_path / "source")
    written = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(written | config))
    if generation is None:
        (source / "generation_config.json").unlink()
    else:
        (source / "generation_config.json").write_text(json.dumps(generation))
    main_export(str(source), tmp_path / "out", do_validation=False)
    return tmp_path / "out"


@pytest.mark.parametrize(
    ("config", "generation", "tokens"),
    [
        pytest.param({"bos_token_id": None}, {}, {"eos_token_id": 7, "pad_token_id": 0}, id="as Trainer writes it"),
        pytest.param(dict.fromkeys(NAMES), dict.fromkeys(NAMES), {}, id="none at all"),
        pytest.param(
            {"bos_token_id": -1, "pad_token_id": -1, "eos_token_id": -1},
            {"eos_token_id": [7, -1, 99999], "temperature": None, "top_k": None, "repetition_penalty": None},
            {"eos_token_id": [7], "pad_token_id": 7},
            id="numbers that are no tokens",
        ),
        pytest.param(
            {"bos_token_id": None, "pad_token_id": None},
            None,
            {"eos_token_id": 7, "pad_token_id": 7},
            id="no generation_config.json",
        ),
    ],
)
def test_special_tokens_that_there_are(config, generation, tokens, checkpoint, expected, tmp_path):
    folder = export_with(checkpoint("trained"), tmp_path, config, generation)
    model = json.loads((folder / GENAI_CONFIG).read_text())["model"]
    assert {name: model[name] for name in NAMES if name in model} == tokens
    assert generated(folder) == expected
    (folder / "config.json").unlink()
    assert [getattr(read_genai_config(folder), name) for name in NAMES] == [tokens.get(name) for name in NAMES]
