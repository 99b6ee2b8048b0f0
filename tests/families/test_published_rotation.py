"""LFM3's rotation as the vendor's config.json has it, under a label that transformers reads otherwise.

`test_formulas.py` compares the tables with the published formula.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import changed_copy, prompts
from optimum.exporters.onnx import main_export
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoModelForCausalLM

from benchmarks.checkpoint import add_tokenizer
from optimum_lfm2 import compat
from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.quality.evaluate import evaluate
from optimum_lfm2.validation.decoder import errors_as_they_are


pytestmark = pytest.mark.skipif("lfm3" in compat.STAND_INS, reason="this transformers has no lfm3")
# The theta is smaller than the vendor's: with heads of 16 the pairs that stand still would hardly turn anyway.
ROPE = {"partial_rotary_factor": 0.5, "rope_theta": 100.0, "rope_type": "proportional"}
PUBLISHED = {
    "auto_map": {
        "AutoConfig": "configuration_lfm3.Lfm3Config",
        "AutoModel": "LiquidAI/LFM3-1.7B--modeling_lfm3.Lfm3Model",
        "AutoModelForCausalLM": "modeling_lfm3.Lfm3ForCausalLM",
    },
    "rope_parameters": {
        "full_attention": ROPE | {"rope_type": "default"},
        "sliding_attention": {"rope_theta": 10000, "rope_type": "default"},
    },
}


@pytest.fixture(scope="module")
def with_tokenizer(checkpoint, tmp_path_factory) -> Path:
    """Its attention is peaky, or wrong rotations would hardly change a token."""

    def sharpen(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".q_norm." in name]:
            tensors[name] = tensors[name] * 5

    path = add_tokenizer(changed_copy(checkpoint("lfm3"), tmp_path_factory.mktemp("lfm3"), sharpen))
    config = json.loads((path / "config.json").read_text())
    config["rope_parameters"]["full_attention"] = ROPE
    (path / "config.json").write_text(json.dumps(config))
    return path


def published(source: Path, folder: Path, **changes: object) -> Path:
    """A copy of a checkpoint with what the vendor's config.json has."""
    path = shutil.copytree(source, folder)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | PUBLISHED | changes))
    return path


def test_the_published_rotation(with_tokenizer, tmp_path, caplog):
    """The label "default" means "proportional" in the graph, in its check, in what is written and in `evaluate`."""
    source = published(with_tokenizer, tmp_path / "source")
    with errors_as_they_are():
        main_export(str(source), tmp_path / "out")
    (line,) = [record.message for record in caplog.records if "partial_rotary_factor" in record.message]
    assert 'rope_parameters.full_attention in config.json says "default"' in line
    assert "\n" not in line
    exported_again = ORTModelForCausalLM.from_pretrained(source, export=True)
    exported_again.save_pretrained(tmp_path / "saved")
    for folder in (tmp_path / "out", tmp_path / "saved"):
        config = json.loads((folder / "config.json").read_text())
        assert config["rope_parameters"]["full_attention"]["rope_type"] == "proportional"
        assert "auto_map" not in config
    (row,) = prompts([30])
    with torch.no_grad():
        right = AutoModelForCausalLM.from_pretrained(with_tokenizer)(row[None], use_cache=False).logits
        wrong = AutoModelForCausalLM.from_pretrained(source)(row[None], use_cache=False).logits
    assert (right - wrong).abs().max() > 0.1
    for model in (exported_again, ORTModelForCausalLM.from_pretrained(tmp_path / "out")):
        torch.testing.assert_close(model(row[None]).logits, right, atol=1e-4, rtol=0)
    text = tmp_path / "text"
    text.write_text("qjxzvkqzxj" * 20)  # letters that make no longer token: the model has only 256 ids
    assert evaluate(tmp_path / "out", source, text, chunks=2, length=32).kl_divergence < 1e-9


def test_a_fine_tune_that_was_trained_by_transformers(with_tokenizer, tmp_path, caplog):
    """As docs/lfm3.md tells: a factor of 1.0 says that whole heads turn."""
    ropes = json.loads(json.dumps(PUBLISHED["rope_parameters"]))
    ropes["full_attention"]["partial_rotary_factor"] = 1.0
    source = published(with_tokenizer, tmp_path / "source", rope_parameters=ropes)
    with errors_as_they_are():
        main_export(str(source), tmp_path / "out")
    assert not [record for record in caplog.records if "partial_rotary_factor" in record.message]
    (row,) = prompts([30])
    with torch.no_grad():
        gold = AutoModelForCausalLM.from_pretrained(source)(row[None], use_cache=False).logits
    own = ORTModelForCausalLM.from_pretrained(tmp_path / "out")(row[None]).logits
    torch.testing.assert_close(own, gold, atol=1e-4, rtol=0)


def test_other_code_is_refused(with_tokenizer, tmp_path):
    code = {"AutoModelForCausalLM": "modeling_mine.Lfm3ForCausalLM"}
    source = published(with_tokenizer, tmp_path / "source", auto_map=code)
    with pytest.raises(Lfm2Error, match=r"auto_map in config.json names modeling_mine\.Lfm3ForCausalLM"):
        main_export(str(source), tmp_path / "out")
