"""Checkpoints with experts: both forms of storage, shards, a model in memory, and what is missing or wrong."""

from __future__ import annotations

import copy

import numpy as np
import onnxruntime
import pytest
import torch
from checkpoints import changed_copy, prompts
from optimum.exporters.onnx import main_export, onnx_export_from_model

from optimum_lfm2 import compat
from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.validation.decoder import errors_as_they_are


pytestmark = pytest.mark.skipif(not compat.TRANSFORMERS_5, reason="transformers 4 has no lfm2_moe")


def packed(tensors: dict[str, torch.Tensor]) -> None:
    """Merge the experts' matrices into the tensors that transformers has in memory."""
    for layer in range(1, 5):
        prefix = f"model.layers.{layer}.feed_forward.experts"
        parts = [[tensors.pop(f"{prefix}.{e}.{part}.weight") for e in range(8)] for part in ("w1", "w3", "w2")]
        gate, up, down = map(torch.stack, parts)
        tensors |= {f"{prefix}.gate_up_proj": torch.cat([gate, up], dim=1), f"{prefix}.down_proj": down}


@pytest.mark.parametrize("variant", ["default", "q4"])
def test_packed_experts_give_the_same_file(variant, checkpoint, exported, tmp_path):
    main_export(
        str(changed_copy(checkpoint("moe"), tmp_path, packed)), tmp_path / "out", do_validation=False, _variant=variant
    )
    one, other = (
        (path / "model.onnx_data").read_bytes() for path in (tmp_path / "out", exported("moe", _variant=variant))
    )
    assert one == other


def test_a_checkpoint_of_the_bare_decoder(gold_model, tmp_path):
    gold_model("moe").model.save_pretrained(tmp_path / "source")
    with errors_as_they_are():
        main_export(str(tmp_path / "source"), tmp_path / "out")
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")
    (row,) = prompts([30])
    with torch.no_grad():
        expected = gold_model("moe").model(input_ids=row[None], use_cache=False).last_hidden_state
    inputs = {"input_ids": row[None].numpy(), "attention_mask": np.ones((1, 30), dtype=np.int64)}
    np.testing.assert_allclose(session.run(None, inputs)[0], expected, atol=1e-4)


@pytest.mark.parametrize("variant", ["default", "q4"])
def test_a_model_in_memory(variant, gold_model, exported, tmp_path):
    model = copy.deepcopy(gold_model("moe"))
    with errors_as_they_are():
        onnx_export_from_model(model, tmp_path, task="text-generation-with-past", _variant=variant)
    one, other = ((path / "model.onnx_data").read_bytes() for path in (tmp_path, exported("moe", _variant=variant)))
    assert one == other
    assert torch.equal(model.lm_head.weight, gold_model("moe").lm_head.weight), "validation gives the weights back"


def test_shards(checkpoint, exported, gold_model, tmp_path):
    gold_model("moe").save_pretrained(tmp_path / "source", max_shard_size="100KB")
    assert len(list((tmp_path / "source").glob("*.safetensors"))) > 5
    main_export(str(tmp_path / "source"), tmp_path / "out", do_validation=False)
    assert (tmp_path / "out" / "model.onnx_data").read_bytes() == (exported("moe") / "model.onnx_data").read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("model.layers.2.feed_forward.experts.5.w3.weight"), r"experts\.5\.w3"),
        (lambda tensors: [tensors.pop(name) for name in list(tensors) if ".experts." in name], "no tensor"),
        (lambda tensors: tensors.pop("model.layers.2.feed_forward.expert_bias"), "expert_bias"),
        (
            lambda tensors: tensors.update({"model.layers.1.feed_forward.experts.3.w2.weight": torch.ones(64, 31)}),
            r"experts\.3\.w2.*\(64, 31\).*\(64, 32\)",
        ),
        (lambda tensors: tensors["model.layers.1.feed_forward.experts.3.w2.weight"].fill_(torch.inf), r"s\.3\.w2"),
    ],
)
def test_a_checkpoint_that_is_not_whole(change, message, checkpoint, tmp_path):
    source = changed_copy(checkpoint("moe"), tmp_path, change)
    with pytest.raises(Lfm2Error, match=message):
        main_export(str(source), tmp_path / "out")
