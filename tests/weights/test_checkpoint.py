"""Reading a checkpoint: shards, prefixes, ties, precision. The tests of broken checkpoints are in `test_command.py`."""

from __future__ import annotations

import pytest
import torch
from checkpoints import make_checkpoint
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, Lfm2ForCausalLM

from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.loading.models import weightless
from optimum_lfm2.weights.checkpoint import Checkpoint, find_tensors, fingerprint, is_finite


def opened(path, task="text-generation", dtype=torch.float32) -> Checkpoint:
    return Checkpoint(find_tensors(str(path)), weightless(AutoConfig.from_pretrained(path), task, dtype))


def assert_same(checkpoint: Checkpoint, expected: dict[str, torch.Tensor]) -> None:
    assert set(checkpoint) == set(expected)
    assert len(checkpoint) == len(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(checkpoint[name], tensor, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["hybrid", "untied"])
def test_every_parameter(name, checkpoint, gold_model):
    assert_same(opened(checkpoint(name)), gold_model(name).state_dict())


def test_whether_there_is_a_tensor_is_told_without_reading_it(checkpoint, monkeypatch):
    monkeypatch.setattr(Checkpoint, "_read", lambda *_: pytest.fail("it was read"))
    weights = opened(checkpoint("hybrid"))
    assert "model.embedding_norm.weight" in weights
    assert "no.weight" not in weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_one_value_that_is_not_finite_is_found(dtype):
    values = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert is_finite(values)
    for wrong in (torch.nan, torch.inf, -torch.inf):
        other = values.clone()
        other[1, 777] = wrong
        assert not is_finite(other)


def test_shards(gold_model, tmp_path):
    gold_model("hybrid").save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_same(opened(tmp_path), gold_model("hybrid").state_dict())


def test_a_decoder_of_a_model_with_head_and_the_reverse(checkpoint, gold_model, tmp_path):
    decoder = gold_model("hybrid").model
    assert_same(opened(checkpoint("hybrid"), "feature-extraction"), decoder.state_dict())
    decoder.save_pretrained(tmp_path)
    assert_same(opened(tmp_path), gold_model("hybrid").state_dict())


def test_bfloat16_becomes_what_is_asked_for(tmp_path):
    path = make_checkpoint("hybrid", tmp_path, dtype=torch.bfloat16)
    assert_same(opened(path), Lfm2ForCausalLM.from_pretrained(path, dtype=torch.float32).state_dict())


def test_a_weight_that_float16_cannot_hold(checkpoint, tmp_path):
    name = "model.layers.0.feed_forward.w1.weight"
    tensors = load_file(checkpoint("hybrid") / "model.safetensors")
    tensors[name][0, 0] = 1e6
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((checkpoint("hybrid") / "config.json").read_bytes())
    assert opened(tmp_path)[name][0, 0] == 1e6
    with pytest.raises(Lfm2Error, match=r"too large for float16. Use --dtype fp32"):
        opened(tmp_path, dtype=torch.float16)[name]


def test_a_fingerprint_sees_every_value(checkpoint, tmp_path):
    tensors = load_file(checkpoint("hybrid") / "model.safetensors")
    before = fingerprint(find_tensors(str(checkpoint("hybrid"))))
    tensors["model.embed_tokens.weight"][-1, -1] += 1e-3
    save_file(tensors, tmp_path / "model.safetensors")
    assert fingerprint(find_tensors(str(tmp_path))) != before
    tensors["model.embed_tokens.weight"][-1, -1] = load_file(checkpoint("hybrid") / "model.safetensors")[
        "model.embed_tokens.weight"
    ][-1, -1]
    save_file(tensors, tmp_path / "model.safetensors")
    assert fingerprint(find_tensors(str(tmp_path))) == before
