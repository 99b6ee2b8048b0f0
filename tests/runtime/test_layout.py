"""Graphs that others exported: other names, no metadata, symbols where ours has numbers."""

from __future__ import annotations

import re
import shutil

import onnx_ir as ir
import pytest
import torch
from checkpoints import gold_tokens, prompts
from optimum.onnxruntime import ORTModelForCausalLM

from optimum_lfm2 import ORTLfm2ForCausalLM
from optimum_lfm2.caches import read_cache_tensors
from optimum_lfm2.errors import Lfm2Error


def foreign(source, target):
    """As onnxruntime-genai's builder names and declares caches; nothing says that padding is safe."""
    shutil.copytree(source, target)
    model = ir.load(target / "model.onnx")
    model.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.name = re.sub(r"(past|present)_conv\.(\d+)", r"\1.\2.conv", value.name)
        if value.name.startswith("past_key_values"):
            value.shape = ir.Shape(["batch_size", 2, "past_sequence_length", "kv_cache_dim"])
    model.graph.outputs[0].shape = ir.Shape(["batch_size", "num_logits", "vocab_size"])
    ir.save(model, target / "model.onnx")
    return target


def test_a_graph_that_gives_caches_and_takes_none():
    assert read_cache_tensors({"input_ids": ["batch_size", "sequence_length"]}, ["logits", "present_conv.0"]) == []


def test_a_padded_batch_on_a_foreign_graph(exported, gold_model, tmp_path):
    model = ORTModelForCausalLM.from_pretrained(foreign(exported("hybrid"), tmp_path / "foreign"))
    assert isinstance(model, ORTLfm2ForCausalLM)
    assert not model.layout.any_padding
    assert model.layout.shapes["past_key_values.2.key"] == (2, None, 16)
    rows = prompts([9, 3])
    ids, mask = torch.full((2, 9), 9), torch.ones(2, 9, dtype=torch.int64)
    ids[0], ids[1, 6:], mask[1, :6] = rows[0], rows[1], 0
    out = model.generate(
        ids, attention_mask=mask, do_sample=False, max_new_tokens=32, eos_token_id=None, pad_token_id=0
    )
    assert out[:, 9:].tolist() == [gold_tokens(gold_model("hybrid"), row, 32) for row in rows]


@pytest.mark.parametrize("io_binding", [True, False])
def test_a_graph_that_gives_the_last_logits_alone(io_binding, exported, gold_model, tmp_path):
    """As exporters that prune the head write it: `generate` needs no others, `forward` may ask for more."""
    folder = shutil.copytree(exported("hybrid"), tmp_path / "model")
    graph = ir.load(folder / "model.onnx")
    graph.graph.inputs.remove(next(value for value in graph.graph.inputs if value.name == "num_logits_to_keep"))
    graph.graph.initializers["num_logits_to_keep"].const_value = ir.tensor(1, name="num_logits_to_keep")
    graph.metadata_props.clear()
    ir.save(graph, folder / "model.onnx")
    model, (row,) = ORTModelForCausalLM.from_pretrained(folder, use_io_binding=io_binding), prompts([9])
    assert not model.layout.keeps_logits
    out = model.generate(row[None], do_sample=False, max_new_tokens=16, eos_token_id=None, pad_token_id=0)
    assert out[0, 9:].tolist() == gold_tokens(gold_model("hybrid"), row, 16)
    for keep, count in ((0, 9), (2, 2)):
        with pytest.raises(Lfm2Error, match=f"last token alone, not of {count}. Pass logits_to_keep=1"):
            model(row[None], logits_to_keep=keep)


def test_a_number_of_logits_in_a_vector(exported, tmp_path):
    folder = shutil.copytree(exported("hybrid"), tmp_path / "model")
    graph = ir.load(folder / "model.onnx")
    (keep,) = (value for value in graph.graph.inputs if value.name == "num_logits_to_keep")
    keep.shape, default = ir.Shape([1]), graph.graph.initializers.pop("num_logits_to_keep")
    assert default.const_value.numpy() == 0
    ir.save(graph, folder / "model.onnx")
    ids = prompts([9])[0][None]
    expected = ORTModelForCausalLM.from_pretrained(exported("hybrid"))(ids).logits
    for io_binding in (True, False):
        model = ORTModelForCausalLM.from_pretrained(folder, use_io_binding=io_binding)
        torch.testing.assert_close(model(ids, logits_to_keep=2).logits, expected[:, -2:], atol=1e-5, rtol=0)
