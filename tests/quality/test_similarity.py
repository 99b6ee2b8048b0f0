"""What `evaluate` refuses: models that it cannot run, and outputs that cannot be compared."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto, helper

from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.quality.evaluate import compare, find_tokenizer
from optimum_lfm2.quality.scoring import OnnxModel
from optimum_lfm2.quality.similarity import HIDDEN, OnnxEncoder, compare_encoders, load_encoder


CHUNKS = [torch.tensor([[9, 8, 7, 6]])]


def graph(folder: Path, inputs: tuple[str, ...], output: str, width: int = 1) -> Path:
    """A graph whose output is its first input, in shape (1, length / width, width): `width` 3 fails to run."""
    shape = helper.make_tensor("shape", TensorProto.INT64, [3], [1, -1, width])
    nodes = [
        helper.make_node("Cast", [inputs[0]], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Reshape", ["float", "shape"], [output]),
    ]
    declared = [helper.make_tensor_value_info(name, TensorProto.INT64, [1, "sequence"]) for name in inputs]
    given = helper.make_tensor_value_info(output, TensorProto.FLOAT, [1, None, width])
    model = helper.make_model(
        helper.make_graph(nodes, "graph", declared, [given], [shape]), opset_imports=[helper.make_opsetid("", 18)]
    )
    model.ir_version = 10
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


def test_models_that_are_none(tmp_path):
    with pytest.raises(Lfm2Error, match=r"nowhere does not exist"):
        load_encoder(tmp_path / "nowhere")
    with pytest.raises(Lfm2Error, match="neither an ONNX file nor an encoder"):
        load_encoder(tmp_path)
    with pytest.raises(Lfm2Error, match="There is no tokenizer in"):
        find_tokenizer(tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(Lfm2Error, match="cannot be loaded"):
        load_encoder(tmp_path)


def test_an_encoder_of_other_inputs_or_that_fails(tmp_path):
    with pytest.raises(Lfm2Error, match="is no encoder: attention_mask, token_type_ids among its inputs"):
        OnnxEncoder(graph(tmp_path, ("input_ids", "token_type_ids"), HIDDEN))
    with pytest.raises(Lfm2Error, match="cannot run") as error:
        list(OnnxEncoder(graph(tmp_path, ("input_ids", "attention_mask"), HIDDEN, width=3))(CHUNKS))
    assert "\n" not in str(error.value)
    encoder = OnnxEncoder(graph(tmp_path, ("input_ids", "attention_mask"), HIDDEN))
    assert not encoder.has_head
    assert [vectors.tolist() for vectors in encoder(CHUNKS)] == [[[9.0], [8.0], [7.0], [6.0]]]


def test_a_decoder_of_other_inputs_or_that_fails(tmp_path):
    with pytest.raises(Lfm2Error, match="has an input token_type_ids, which is not supported"):
        list(OnnxModel(graph(tmp_path, ("input_ids", "token_type_ids"), "logits"))(CHUNKS))
    with pytest.raises(Lfm2Error, match="cannot run on empty caches") as error:
        list(OnnxModel(graph(tmp_path, ("input_ids",), "logits", width=3))(CHUNKS))
    assert "\n" not in str(error.value)
    # All that a chunk scores: its second half and the token before it.
    assert [logits.tolist() for logits in OnnxModel(graph(tmp_path, ("input_ids",), "logits"))(CHUNKS)] == [
        [[8.0], [7.0], [6.0]]
    ]


def test_logits_that_cannot_be_compared():
    ids, logits = torch.tensor([5, 6, 1, 0]), torch.zeros(3, 8)
    compare(logits, logits, ids)
    with pytest.raises(Lfm2Error, match="vocabularies of the two models differ: 8 and 9 tokens"):
        compare(logits, torch.zeros(3, 9), ids)
    for broken in (logits.fill_diagonal_(torch.nan), torch.full((3, 8), torch.inf)):
        with pytest.raises(Lfm2Error, match="not finite"):
            compare(broken, torch.zeros(3, 8), ids)


class Given:
    """An encoder whose vectors are known beforehand."""

    def __init__(self, vectors: torch.Tensor, has_head: bool = True) -> None:
        self.vectors, self.has_head = vectors, has_head

    def __call__(self, chunks):
        return iter([self.vectors])


def test_vectors_that_cannot_be_compared():
    gold = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    found = compare_encoders(Given(torch.tensor([[1.0, 0.0], [1.0, 1.0]])), Given(gold), CHUNKS)
    assert found.cosine == pytest.approx((1 + 0.5**0.5) / 2)
    assert found.agreement == 0.5  # of two equal entries the first counts
    assert compare_encoders(Given(gold, has_head=False), Given(gold), CHUNKS).agreement is None
    with pytest.raises(Lfm2Error, match=r"differ in shape: \(2, 1\) and \(2, 2\)"):
        compare_encoders(Given(gold[:, :1]), Given(gold), CHUNKS)
    with pytest.raises(Lfm2Error, match="not finite"):
        compare_encoders(Given(gold * torch.nan), Given(gold), CHUNKS)
