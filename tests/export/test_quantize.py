"""Graphs with weights in 4 and 8 bits: what they compute, their nodes, and what they do to a text."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx_ir as ir
import onnxruntime
import pytest
import torch
from optimum.exporters.onnx import main_export, onnx_export_from_model
from optimum.onnxruntime import ORTModelForCausalLM
from rounding import to_nearest
from transformers import AutoConfig, AutoTokenizer

from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.export import quantize
from optimum_lfm2.quality.evaluate import evaluate
from optimum_lfm2.validation.decoder import errors_as_they_are
from optimum_lfm2.weights.blocks import SCHEMES, Scheme, module_blocks, pack, quantize_tensor, rounded, scheme_of


pytestmark = pytest.mark.once

DEMO = Path(__file__).parents[2] / "demo"


@contextmanager
def dequantized(model: torch.nn.Module, scheme: Scheme | None) -> Iterator[None]:
    """Within the `with` block, `model` computes with the dequantised values of its weights.

    So it can be compared with the quantised graph. None as the scheme changes nothing.
    """
    blocks = {} if scheme is None else module_blocks(model, scheme)
    originals = {module: module.weight for module in blocks}
    replaced: dict[int, torch.nn.Parameter] = {}
    try:
        for module, original in originals.items():
            if id(original) not in replaced:
                values = rounded(original.detach(), blocks[module])
                replaced[id(original)] = torch.nn.Parameter(values, requires_grad=False)
            module.weight = replaced[id(original)]
        yield
    finally:
        for module, original in originals.items():
            module.weight = original


def test_a_value_that_has_no_code(gold_model, tmp_path):
    """Of a model in memory: a checkpoint's are refused where they are read."""
    model = copy.deepcopy(gold_model("hybrid"))
    with torch.no_grad():
        model.model.layers[1].feed_forward.w2.weight[3, 5] = torch.inf
    with pytest.raises(Lfm2Error, match=r"layers\.1\.feed_forward\.w2.* cannot be quantised") as error:
        onnx_export_from_model(model, tmp_path, task="text-generation", _variant="q8")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "options", [{"_variant": "q4"}, {"_variant": "q4s"}, {"_variant": "q8"}, {"_variant": "q4", "dtype": "fp16"}]
)
@pytest.mark.parametrize("name", ["hybrid", "odd_head_dim", "conv_bias", "untied"])
def test_the_graph_computes_with_the_dequantised_weights(name, options, exported, gold_model):
    """The remaining error is the noise of int8 activations and half precision, also for widths with a padded block."""
    model = ORTModelForCausalLM.from_pretrained(exported(name, **options))
    scheme = scheme_of(options["_variant"], options.get("dtype", "fp32"))
    ids = torch.randint(8, 256, (1, 24), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        plain = gold_model(name)(input_ids=ids, use_cache=False).logits
        with dequantized(gold_model(name), scheme):
            expected = gold_model(name)(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(gold_model(name)(input_ids=ids, use_cache=False).logits, plain)
    out = model(ids).logits.float()
    error = float((out - expected).pow(2).mean().sqrt() / expected.pow(2).mean().sqrt())
    assert error < 0.12
    if scheme.linear.bits == 4:
        assert error < 0.7 * float((plain - expected).pow(2).mean().sqrt() / expected.pow(2).mean().sqrt())


def test_nodes_and_the_one_table(exported):
    folder = exported("trained", _variant="q4")
    graph = ir.load(folder / "model.onnx").graph
    operators = [node.op_type for node in graph]
    assert "Gemm" not in operators
    assert operators.count("GatherBlockQuantized") == 1
    nodes = [node for node in graph if node.op_type == "MatMulNBits"]
    assert {node.attributes.get_int("accuracy_level") for node in nodes} == {4}
    (gather,) = (node for node in graph if node.op_type == "GatherBlockQuantized")
    table, head = gather.inputs[0].const_value, nodes[-1].inputs[1].const_value
    assert (table.offset, table.length) == (head.offset, head.length)
    assert gather.inputs[2] is nodes[-1].inputs[2]
    floats = sum(parameter.numel() for parameter in _model().parameters())
    assert (folder / "model.onnx_data").stat().st_size < floats * 0.68


def test_the_embedding_in_float(tmp_path, checkpoint):
    main_export(
        str(checkpoint("trained")), tmp_path, _variant="q4", do_validation=False, model_kwargs={"embedding": "float"}
    )
    graph = ir.load(tmp_path / "model.onnx").graph
    assert "GatherBlockQuantized" not in [node.op_type for node in graph]
    *layers, head = _bits_of_linears(graph)
    assert (set(layers), head) == ({4}, 8)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    inputs = tokenizer("Once upon a time there was a girl named Nora", return_tensors="pt")
    out = ORTModelForCausalLM.from_pretrained(tmp_path).generate(**inputs, max_new_tokens=8, do_sample=False)
    assert "who lived" in tokenizer.decode(out[0])


@pytest.mark.parametrize("options", [{}, {"dtype": "fp16"}], ids=["fp32", "fp16"])
@pytest.mark.parametrize("variant", ["q4", "q4s"])
@pytest.mark.parametrize("name", ["hybrid", "untied", "odd_head_dim", "trained"])
def test_the_portable_embedding_is_the_fused_one(name, variant, options, exported, checkpoint, tmp_path):
    """Standard operators of ONNX give the same values, and the file is no larger."""
    options = {"_variant": variant, **options}
    main_export(str(checkpoint(name)), tmp_path, do_validation=False, model_kwargs={"embedding": "portable"}, **options)
    assert "GatherBlockQuantized" not in [node.op_type for node in ir.load(tmp_path / "model.onnx").graph]
    sizes = [(folder / "model.onnx_data").stat().st_size for folder in (tmp_path, exported(name, **options))]
    assert sizes[0] <= sizes[1]
    ids = torch.randint(8, 256, (2, 24), generator=torch.Generator().manual_seed(2))
    portable, fused = (
        ORTModelForCausalLM.from_pretrained(folder)(ids).logits for folder in (tmp_path, exported(name, **options))
    )
    torch.testing.assert_close(portable, fused, rtol=0, atol=0)


@pytest.mark.parametrize(("dtype", "size"), [("fp32", 128), ("fp16", 32)])
@pytest.mark.parametrize(("variant", "blocks"), [("q4", (8, 128)), ("q4s", (4, 128))])
@pytest.mark.parametrize("name", ["hybrid", "untied"])
def test_the_blocks_of_layers_and_of_a_table(name, variant, blocks, dtype, size, exported):
    """A browser's GPU reads prompts in tiles only from blocks of 32."""
    options = {} if dtype == "fp32" else {"dtype": dtype}
    nodes = ir.load(exported(name, _variant=variant, **options) / "model.onnx").graph
    *layers, head = (
        tuple(node.attributes.get_int(key) for key in ("bits", "block_size"))
        for node in nodes
        if node.op_type == "MatMulNBits"
    )
    assert set(layers) == {(4, size)}
    assert head == blocks


def test_a_feed_forward_has_the_form_that_webgpu_joins(exported, checkpoint):
    """What matmul_nbits_mlp_fusion.cc of onnxruntime looks for. One more reader of the norm, and it joins nothing."""
    graph = ir.load(exported("hybrid", _variant="q4", dtype="fp16") / "model.onnx").graph
    found = 0
    for sigmoid in (node for node in graph if node.op_type == "Sigmoid"):
        gate = sigmoid.inputs[0].producer()
        (silu,) = (use.node for use in sigmoid.outputs[0].uses())
        (product,) = (use.node for use in silu.outputs[0].uses())
        (up,) = (value.producer() for value in product.inputs if value is not silu.outputs[0])
        assert [node.op_type for node in (gate, up, silu, product)] == ["MatMulNBits", "MatMulNBits", "Mul", "Mul"]
        assert {use.node for use in gate.outputs[0].uses()} == {sigmoid, silu}
        for node in (gate, up):
            assert (node.attributes.get_int("bits"), node.attributes.get_int("block_size")) == (4, 32)
            assert len(node.inputs) == 3  # no zero points
        norm = gate.inputs[0].producer()
        assert norm.op_type == "SkipSimplifiedLayerNormalization"
        assert {use.node for use in norm.outputs[0].uses()} == {gate, up}
        assert [len(output.uses()) for output in norm.outputs] == [2, 0, 0, 1]
        found += 1
    assert found == AutoConfig.from_pretrained(checkpoint("hybrid")).num_hidden_layers


def _bits_of_linears(graph):
    return [node.attributes.get_int("bits") for node in graph if node.op_type == "MatMulNBits"]


def test_unknown_model_kwargs(tmp_path, checkpoint):
    with pytest.raises(Lfm2Error, match="embeding"):
        main_export(str(checkpoint("hybrid")), tmp_path, do_validation=False, model_kwargs={"embeding": "float"})


@pytest.mark.parametrize(
    ("variant", "agreement", "divergence"), [("q8", 0.99, 1e-4), ("q4", 0.96, 4e-3), ("q4s", 0.96, 6e-3)]
)
def test_quality_on_held_out_text(variant, agreement, divergence, exported):
    quality = evaluate(exported("trained", _variant=variant), DEMO / "checkpoint", DEMO / "heldout.txt", chunks=16)
    assert quality.top1_agreement >= agreement
    assert quality.kl_divergence <= divergence
    assert quality.perplexity < 1.01 * quality.reference_perplexity


def test_q4_is_no_worse_than_rounding_to_nearest_in_blocks_of_32(exported, tmp_path):
    model = _model()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (torch.nn.Linear, torch.nn.Embedding)) and module is not model.lm_head:
                module.weight.copy_(to_nearest(module.weight, 4, 32))  # the head is tied
    model.save_pretrained(tmp_path)
    own, bound = (
        evaluate(path, DEMO / "checkpoint", DEMO / "heldout.txt")
        for path in (exported("trained", _variant="q4"), tmp_path)
    )
    assert own.kl_divergence <= bound.kl_divergence
    assert own.perplexity <= bound.perplexity
    assert own.top1_agreement >= bound.top1_agreement


def _high_nibble_first(codes, blocks):
    return codes if blocks.bits == 8 else codes[..., 0::2] << 4 | codes[..., 1::2]


def _one_layer_forgotten(codes, blocks):
    return torch.full_like(pack(codes, blocks), 0x88) if codes.shape[:2] == (384, 1) else pack(codes, blocks)


@pytest.mark.parametrize("mistake", [_high_nibble_first, _one_layer_forgotten])
def test_validation_finds_wrong_codes(mistake, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(quantize, "pack", mistake)
    with pytest.raises(Lfm2Error, match="The file is wrong"), errors_as_they_are():
        main_export(str(checkpoint("trained")), tmp_path, _variant="q4")


def test_padded_rows_are_as_if_alone(exported):
    folder = exported("trained", _variant="q4")
    model, tokenizer = ORTModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    tokenizer.padding_side = "left"
    texts = ["Once upon a time there was a girl named Nora", "In a house by the harbour lived"]
    settings = {"max_new_tokens": 24, "do_sample": False}
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    together = model.generate(**batch, **settings)[:, batch.input_ids.shape[1] :]
    for row, text in zip(together, texts, strict=True):
        alone = tokenizer(text, return_tensors="pt")
        assert row.tolist() == model.generate(**alone, **settings)[0, alone.input_ids.shape[1] :].tolist()


def _model():
    from transformers import Lfm2ForCausalLM

    return Lfm2ForCausalLM.from_pretrained(DEMO / "checkpoint")


def test_onnxruntime_loads_it_without_a_word(exported, capfd):
    onnxruntime.InferenceSession(exported("trained", _variant="q8") / "model.onnx")
    assert "Error" not in capfd.readouterr().err


def test_joined_projections_have_the_codes_that_each_has_alone(exported, gold_model):
    graph = ir.load(exported("hybrid", _variant="q4") / "model.onnx").graph
    state, blocks = gold_model("hybrid").state_dict(), SCHEMES["q4"].linear
    name = "model.layers.2.self_attn.{}.weight"
    parts = [quantize_tensor(state[name.format(part)], blocks) for part in ("q_proj", "k_proj", "v_proj")]
    joined = name.format("q_proj+k_proj+v_proj")
    codes, scales = (graph.initializers[f"{joined}.{kind}"].const_value.numpy() for kind in ("q4", "scales"))
    assert (codes == torch.cat([pack(own, blocks) for own, _ in parts]).numpy()).all()
    assert (scales == torch.cat([own for _, own in parts]).numpy()).all()
