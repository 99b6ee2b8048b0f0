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


def test_a_token_behind_padding_has_the_position_that_follows_its_row(with_positions, gold_model):
    """Equal shifts of a whole row go unseen by rotary embeddings; a gap within a row does not."""
    model = ORTModelForCausalLM.from_pretrained(with_positions)
    rows, token = prompts([9, 2]), torch.tensor([20])
    ids, mask = torch.full((2, 9), 9), torch.zeros(2, 9, dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    cache = model(ids, attention_mask=mask, return_dict=False)[1]
    mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.int64)], dim=1)
    logits = model(token.expand(2, 1), attention_mask=mask, past_key_values=cache).logits[:, -1]
    for i, row in enumerate(rows):
        expected = gold_model("hybrid")(input_ids=torch.cat([row, token])[None]).logits[0, -1]
        torch.testing.assert_close(logits[i], expected, atol=1e-4, rtol=0)
