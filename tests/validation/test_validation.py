"""Validation: right files pass at its tolerances, and each kind of mistake is found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from checkpoints import CHECKPOINTS
from optimum.exporters.onnx import main_export

from optimum_lfm2 import configs
from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.export import finish
from optimum_lfm2.graph import blocks, ops
from optimum_lfm2.validation import decoder, pieces, reference
from optimum_lfm2.validation.decoder import errors_as_they_are


# One checkpoint of each member, and of each kind of layer alone: a task changes what a graph ends in.
ALIKE = ("hybrid", "all_conv", "all_attention", "moe", "lfm3", "granite", "olmo")
ROUNDED = ("hybrid", "odd_head_dim", "conv_bias", "untied", "all_conv", "all_attention")


def export(source: Path, out: Path, **options: object) -> None:
    with errors_as_they_are():
        main_export(str(source), out, **options)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_every_checkpoint_is_right_to_1e_4(name, exported):
    exported(name)  # validates


@pytest.mark.parametrize("name", [name for name in ALIKE if name in CHECKPOINTS])
@pytest.mark.parametrize("task", ["text-generation", "feature-extraction"])
def test_every_task_is_right_to_1e_4(name, task, checkpoint, tmp_path):
    export(checkpoint(name), tmp_path, task=task)


# Both releases have these models, and nothing of a release is in how their weights are rounded.
@pytest.mark.parametrize(
    "name",
    [
        *(pytest.param(name, marks=pytest.mark.once) for name in ROUNDED),
        *(name for name in ("moe",) if name in CHECKPOINTS),
    ],
)
@pytest.mark.parametrize(
    "options", [{"_variant": "q4"}, {"_variant": "q8"}, {"dtype": "fp16"}, {"_variant": "q4", "dtype": "fp16"}], ids=str
)
def test_every_precision_is_right(name, options, checkpoint, tmp_path):
    if name == "odd_head_dim" and "_variant" in options:
        pytest.skip("covered by untied: its widths are no multiples of blocks")
    export(checkpoint(name), tmp_path, **options)


@pytest.mark.parametrize("shapes", [{"batch_size": 3, "sequence_length": 5}, {"batch_size": 2, "sequence_length": 1}])
def test_other_shapes(shapes, checkpoint, tmp_path):
    export(checkpoint("hybrid"), tmp_path, **shapes)


def finds(match: str, source: Path, out: Path, **options: object) -> None:
    with pytest.raises(Lfm2Error, match=match):
        export(source, out, **options)


# A mistake in the file's weights: the tensor, and what becomes of its values.
WEIGHTS: dict[str, tuple[dict, str, Callable[[np.ndarray], np.ndarray]]] = {
    "a row of a projection": ({}, "model.layers.0.conv.out_proj.weight", lambda w: scaled_row(w, 3, 1.05)),
    "a square matrix transposed": ({}, "model.layers.1.conv.out_proj.weight", lambda w: w.T.copy()),
    "a norm": ({}, "model.layers.3.ffn_norm.weight", lambda w: w * 1.01),
    "a norm of heads": ({}, "model.layers.2.self_attn.q_layernorm.weight", lambda w: w[::-1].copy()),
    "a convolution back to front": ({}, "model.layers.3.conv.conv.weight", lambda w: w[::-1].copy()),
    "a row of the embedding": ({}, "model.embed_tokens.weight", lambda w: np.roll(w, 1, 0)),
    "a block's scale": (
        {"_variant": "q4"},
        "model.layers.0.feed_forward.w2.weight.scales",
        lambda w: scaled_row(w, 5, 1.5),
    ),
    "codes": (
        {"_variant": "q8"},
        "model.layers.2.self_attn.q_proj+k_proj+v_proj.weight.q8",
        lambda w: np.concatenate([w[:-32], w[-32:] ^ 4]),  # those of v alone
    ),
    "not a number": ({}, "model.layers.4.feed_forward.w1.weight", lambda w: scaled_row(w, 0, np.nan)),
}


def scaled_row(values: np.ndarray, row: int, factor: float) -> np.ndarray:
    values = values.copy()
    values[row] *= factor
    return values


@pytest.mark.parametrize("mistake", WEIGHTS)
def test_it_finds_a_wrong_weight(mistake, checkpoint, tmp_path, monkeypatch):
    options, name, change = WEIGHTS[mistake]

    def bind(path, *args):
        finish.bind(path, *args)
        model = ir.load(path)
        value = model.graph.initializers[name].const_value
        changed = change(value.numpy())
        if isinstance(value, ir.ExternalTensor):
            with Path(value.path).open("r+b") as file:
                file.seek(value.offset)
                file.write(np.ascontiguousarray(changed).tobytes())
        else:
            model.graph.initializers[name].const_value = ir.tensor(changed, name=name)
            ir.save(model, path)

    monkeypatch.setattr(configs, "bind", bind)
    finds("differs from transformers", checkpoint("hybrid"), tmp_path, **options)


def test_it_finds_swapped_weights(checkpoint, tmp_path, monkeypatch):
    """K in the place of v, which have one shape."""

    class Swapped(dict):
        def __getitem__(self, name):
            return super().__getitem__(name.replace("2.self_attn.k_proj", "2.self_attn.v_proj"))

    monkeypatch.setattr(configs, "bind", lambda path, weights, *rest: finish.bind(path, Swapped(weights), *rest))
    finds(r"layers\.2|present\.2", checkpoint("hybrid"), tmp_path)


def _wrong_theta(monkeypatch):
    real = ops.rotary_table
    monkeypatch.setattr(ops, "rotary_table", lambda at, inverse, *rest: real(at, inverse**0.9, *rest))


def _no_gate(monkeypatch):
    monkeypatch.setattr(ops, "silu", lambda x: x)


def _padding_in_the_state(monkeypatch):
    real = blocks.shapes.columns_at
    monkeypatch.setattr(blocks.shapes, "columns_at", lambda columns, kept: real(columns, kept - kept[:, :1] + 16))


def _padding_is_seen(monkeypatch):
    monkeypatch.setattr(ops, "MASKED", 0.0)


@pytest.mark.parametrize("mistake", [_wrong_theta, _no_gate, _padding_in_the_state, _padding_is_seen])
def test_it_finds_a_wrong_graph(mistake, checkpoint, tmp_path, monkeypatch):
    mistake(monkeypatch)
    finds("The file is wrong", checkpoint("hybrid"), tmp_path)


def _edited(monkeypatch, edit: Callable[[ir.Model], None]) -> None:
    def bind(path, *args):
        finish.bind(path, *args)
        model = ir.load(path)
        edit(model)
        ir.save(model, path)

    monkeypatch.setattr(configs, "bind", bind)


def test_it_refuses_what_onnxruntime_does_not_run(checkpoint, tmp_path, monkeypatch):
    def edit(model: ir.Model) -> None:
        next(node for node in model.graph if node.op_type == "GroupQueryAttention").attributes.add(
            ir.AttrInt64("num_heads", 3)
        )

    _edited(monkeypatch, edit)
    finds("does not (run|load)", checkpoint("hybrid"), tmp_path)


def test_it_refuses_outputs_in_another_order(checkpoint, tmp_path, monkeypatch):
    def edit(model: ir.Model) -> None:
        outputs = model.graph.outputs
        outputs[1], outputs[2] = outputs[2], outputs[1]

    _edited(monkeypatch, edit)
    finds("its outputs are logits, present_conv.1, present_conv.0", checkpoint("hybrid"), tmp_path)


def test_it_refuses_a_graph_without_one_of_its_norms(checkpoint, tmp_path, monkeypatch):
    def edit(model: ir.Model) -> None:
        value = model.graph.initializers.pop("model.layers.1.ffn_norm.weight")
        value.name = value.const_value.name = "another"
        model.graph.register_initializer(value)

    _edited(monkeypatch, edit)
    finds("lacks model.layers.1.ffn_norm", checkpoint("hybrid"), tmp_path)


@pytest.mark.parametrize(("lost", "says"), [(3, "layers.1.ffn_norm"), (4, "layers.2.operator_norm"), (-1, "logits")])
def test_it_refuses_a_value_that_no_piece_gives(lost, says, checkpoint, tmp_path, monkeypatch):
    def some(graph, cuts, caches):
        found = list(pieces.split(graph, cuts, caches))
        del found[lost]
        return found

    monkeypatch.setattr(decoder, "split", some)
    finds(f"{says} could not be compared", checkpoint("hybrid"), tmp_path)


def test_the_file_as_a_whole_is_run_too(checkpoint, tmp_path, monkeypatch):
    """Pieces that are right do not make a whole that is: here its outputs come of other inputs."""
    monkeypatch.setattr(decoder, "judge", lambda *_: None)
    _wrong_theta(monkeypatch)
    _no_gate(monkeypatch)
    finds("as a whole its logits", checkpoint("hybrid"), tmp_path)


def test_the_whole_of_a_quantised_file_keeps_activations_in_float(checkpoint, tmp_path, monkeypatch):
    """The file that is kept rounds them to 8 bits."""
    opened, real = [], decoder.open_session
    monkeypatch.setattr(decoder, "open_session", lambda model, folder: opened.append(model) or real(model, folder))
    export(checkpoint("hybrid"), tmp_path, _variant="q4")

    def levels(model: onnx.ModelProto) -> set[int]:
        products = [node for node in model.graph.node if node.op_type == "MatMulNBits"]
        return {attribute.i for node in products for attribute in node.attribute if attribute.name == "accuracy_level"}

    (whole,) = opened
    assert levels(onnx.load_from_string(whole)) == set()
    assert levels(onnx.load(tmp_path / "model.onnx", load_external_data=False)) == {4}


def test_without_memory_the_whole_is_left_out(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(decoder, "available_memory", lambda: 0.0)
    monkeypatch.setattr(decoder, "open_session", lambda *_: pytest.fail("it was loaded"))
    export(checkpoint("hybrid"), tmp_path)


def test_nothing_compared_is_no_success(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(reference, "visible_rows", lambda *_: iter(()))
    finds("nothing can be compared", checkpoint("hybrid"), tmp_path)


def test_a_weight_that_cannot_be_read_is_an_error_and_no_deadlock(checkpoint, tmp_path, monkeypatch):
    real = reference.StandIns.__getitem__

    def read(self, name):
        if "layers.2" in name:
            raise Lfm2Error("cannot be read")
        return real(self, name)

    monkeypatch.setattr(reference.StandIns, "__getitem__", read)
    finds("cannot be read", checkpoint("hybrid"), tmp_path)


def test_a_configuration_of_others_goes_to_optimum():
    seen = []

    class Other:
        validate = None  # a method that another plugin's configuration may have

    replaced = decoder.validated(lambda *args, **options: seen.append((args, options)), configs.Lfm2OnnxConfig)
    replaced(other := Other(), "model", "file", ["logits"], 1e-3, device="cpu")
    assert seen == [((other, "model", "file", ["logits"], 1e-3), {"device": "cpu"})]


def test_relative_error_is_of_the_worst_token():
    gold = torch.ones(1, 3, 4)
    gold[0, 1] = torch.nan  # a masked token
    own = gold.clone()
    own[0, 2, 0] += 1
    assert decoder.relative_error(own - gold, gold, gold * 0, 1) == pytest.approx(0.5)
    assert decoder.relative_error(own - gold, gold, gold * 0.5, 1) == 0
    assert np.isnan(decoder.relative_error(gold, gold * torch.nan, gold, 1))
