"""Graphs of others that take `position_ids`: the runtime computes them from the mask."""

from __future__ import annotations

import shutil

import onnx
import pytest
import torch
from checkpoints import gold_tokens, prompts
from optimum.onnxruntime import ORTModelForCausalLM


GREEDY = {"do_sample": False, "max_new_tokens": 16, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(scope="module")
def with_positions(exported, tmp_path_factory):
    """Our graph, in which an input takes the place of the positions that it computes."""
    folder = shutil.copytree(exported("hybrid"), tmp_path_factory.mktemp("positions") / "model")
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    (clipped,) = (node.output[0] for node in model.graph.node if node.op_type == "Clip")
    (computed,) = (node.output[0] for node in model.graph.node if clipped in node.input)
    for node in model.graph.node:
        node.input[:] = ["position_ids" if name == computed else name for name in node.input]
    shape = ["batch_size", "sequence_length"]
    model.graph.input.append(onnx.helper.make_tensor_value_info("position_ids", onnx.TensorProto.INT64, shape))
    onnx.save(model, folder / "model.onnx")
    return folder


@pytest.mark.parametrize("io_binding", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_go_on_as_alone(side, io_binding, with_positions, gold_model):
    model = ORTModelForCausalLM.from_pretrained(with_positions, use_io_binding=io_binding)
    rows = prompts([9, 2, 12])
    ids, mask = torch.full((3, 12), 9), torch.zeros(3, 12, dtype=torch.int64)
    for i, row in enumerate(rows):
        columns = slice(12 - len(row), 12) if side == "left" else slice(0, len(row))
        ids[i, columns], mask[i, columns] = row, 1
    out = model.generate(ids, attention_mask=mask, **GREEDY)
    assert out[:, 12:].tolist() == [gold_tokens(gold_model("hybrid"), row, 16) for row in rows]
