"""The feed-forward of experts: the router, the experts, and the operators that run them.

The reference is transformers' `Lfm2MoeSparseMoeBlock`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import onnx_ir as ir
import torch
from transformers import PretrainedConfig

from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.graph import shapes
from optimum_lfm2.graph.editing import CONTRIB_DOMAIN, add_initializer, parameter_name, substitute
from optimum_lfm2.graph.member import Weight
from optimum_lfm2.graph.ops import ONNX_TYPE, PLACEHOLDER_DOMAIN
from optimum_lfm2.graph.tracing import Node, constant, typed
from optimum_lfm2.weights.blocks import INT8_ACTIVATIONS, Blocks, Scheme
from optimum_lfm2.weights.coded import WIDE, coded
from optimum_lfm2.weights.experts import ExpertsTensor, QuantizedExperts, interleaved


EXPERTS_OP = "Experts"  # a placeholder, which `place_experts` replaces
NORM_EPSILON = 1e-6  # transformers'
SMALLEST_BLOCK = 16  # QMoE takes no smaller block (onnxruntime 1.32)
GATE_UP, DOWN = "gate_up_proj", "down_proj"
# The layout that CPU, CUDA and WebGPU all take: a row of the gate, a row of what it gates, and so on.
SWIGLU = {"activation_type": "swiglu", "swiglu_fusion": 1}


def sparse_feed_forward(hidden: torch.Tensor, weight: Weight, name: str, config: PretrainedConfig) -> torch.Tensor:
    """Run each token through the experts that the router chooses.

    (batch_size, sequence_length, hidden_size) → the same. `name` is that of the feed-forward's module.
    """
    tokens = shapes.resized(hidden, (-1, config.hidden_size))
    bias = weight(f"{name}.expert_bias") if config.use_expert_bias else None
    routing = route(
        tokens,
        weight(f"{name}.gate.weight"),
        bias,
        config.num_experts_per_tok,
        config.norm_topk_prob,
        config.routed_scaling_factor,
    )
    gate_up, down = (weight(f"{name}.experts.{kind}") for kind in (GATE_UP, DOWN))
    mixed = mix_experts(tokens, routing, gate_up, down, config.num_experts_per_tok)
    return shapes.sized_like(mixed, hidden)


class _Route(Node):
    @staticmethod
    def forward(ctx, hidden, gate, bias, count, normalize, factor):
        return hidden.new_zeros(hidden.shape[0], gate.shape[0])

    @staticmethod
    @typed(2)
    def symbolic(g, hidden, gate, bias, count, normalize, factor):
        def number(value):
            return g.op("Constant", value_t=torch.tensor(value))

        dtype = hidden.type().dtype()
        if dtype is not torch.float32:
            hidden, gate = (g.op("Cast", x, to_i=ONNX_TYPE[torch.float32]) for x in (hidden, gate))
        # A MatMul, not a Gemm, so that no quantiser takes it: a rounded score would choose another expert.
        logits = g.op("MatMul", hidden, g.op("Transpose", gate, perm_i=[1, 0]))
        # This is a sigmoid. onnxruntime's Sigmoid has an absolute error of 6e-8, and small scores are smaller than that
        # (onnxruntime 1.32; tests/test_claims.py).
        scores = g.op("Reciprocal", g.op("Add", g.op("Exp", g.op("Neg", logits)), number(1.0)))
        biased = scores if bias is None else g.op("Add", scores, bias)
        _, chosen = g.op("TopK", biased, constant(g, [count]), axis_i=-1, outputs=2)
        weights = g.op("GatherElements", scores, chosen, axis_i=1)
        if normalize:
            total = g.op("ReduceSum", weights, constant(g, [1]), keepdims_i=1)
            weights = g.op("Div", weights, g.op("Add", total, number(NORM_EPSILON)))
        if factor != 1.0:
            weights = g.op("Mul", weights, number(float(factor)))
        zeros = g.op("ConstantOfShape", g.op("Shape", scores), value_t=torch.zeros(1))
        routing = g.op("ScatterElements", zeros, chosen, weights, axis_i=1)
        return routing if dtype is torch.float32 else g.op("Cast", routing, to_i=ONNX_TYPE[dtype])


def route(
    hidden: torch.Tensor, gate: torch.Tensor, bias: torch.Tensor | None, count: int, normalize: bool, factor: float
) -> torch.Tensor:
    """Compute the share of each expert in each token. It is 0 for all but the `count` experts that are chosen.

    Args:
        hidden: (tokens, hidden_size).
        gate: (experts, hidden_size).
        bias: float32 (experts), or None. It is added to the scores that choose experts. The shares are without it.
        count: the number of experts of a token. Of equal scores, that of the first expert wins.
        normalize: whether the shares of a token sum to 1.
        factor: what each share is multiplied by.

    Returns:
        (tokens, experts) of the dtype of `hidden`. It is computed in float32.
    """
    return _Route.apply(hidden, gate, bias, count, normalize, factor)


class _Experts(Node):
    @staticmethod
    def forward(ctx, hidden, routing, gate_up, down, count):
        return torch.zeros_like(hidden)

    @staticmethod
    @typed(2)
    def symbolic(g, hidden, routing, gate_up, down, count):
        return g.op(f"{PLACEHOLDER_DOMAIN}::{EXPERTS_OP}", hidden, routing, gate_up, down, k_i=count)


def mix_experts(
    hidden: torch.Tensor, routing: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, count: int
) -> torch.Tensor:
    """Sum the outputs of SwiGLU experts, each multiplied by its share: (tokens, hidden_size).

    Args:
        hidden: (tokens, hidden_size).
        routing: (tokens, experts), with `count` shares a token that are not 0.
        gate_up: (experts, 2 * width, hidden_size), the gate's rows first.
        down: (experts, hidden_size, width).
        count: the number of experts of a token.
    """
    return _Experts.apply(hidden, routing, gate_up, down, count)


def expert_blocks(scheme: Scheme | None, widths: Iterable[int], names: Sequence[str] = ("",)) -> Blocks | None:
    """Return how experts are stored whose matrices have rows of these widths. QMoE takes whole blocks of one kind only.

    Args:
        scheme: how the model is quantised.
        widths: of the rows.
        names: of the two parameters. Where a scheme stores these differently, both are stored in `WIDE`.

    Returns:
        None for experts in float.

    Raises:
        Lfm2Error: the blocks would be smaller than `SMALLEST_BLOCK`.
    """
    kinds = {None if scheme is None else scheme.layer(name, table=False) for name in names}
    blocks = kinds.pop() if len(kinds) == 1 else WIDE
    if blocks is None:
        return None
    size = math.gcd(blocks.block_size, *widths)
    if size < SMALLEST_BLOCK:
        raise Lfm2Error(
            f"hidden_size and moe_intermediate_size in config.json ({' and '.join(map(str, widths))}) must be "
            f"multiples of {SMALLEST_BLOCK} for experts in few bits. Use --variant default."
        )
    return replace(blocks, block_size=size)


def place_experts(graph: ir.Graph, weights: Mapping[str, Any], scheme: Scheme | None) -> None:
    """Replace the experts of a traced graph by the operators that onnxruntime has for them.

    Args:
        graph: the traced graph.
        weights: each parameter by its name. A parameter of experts gives one matrix for each index.
        scheme: how the weights are quantised. None keeps them in float.
    """
    for node in [node for node in graph if (node.domain, node.op_type) == (PLACEHOLDER_DOMAIN, EXPERTS_OP)]:
        matrices = node.inputs[2:]
        names, widths = map(parameter_name, matrices), (matrix.shape.numpy()[2] for matrix in matrices)
        blocks = expert_blocks(scheme, widths, list(names))
        new = _float_experts(node, weights) if blocks is None else _quantized_experts(node, weights, blocks)
        graph.insert_before(node, new)
        substitute(node, new[-1].outputs[0])


def _float_experts(node: ir.Node, weights: Mapping[str, Any]) -> list[ir.Node]:
    """Emit MoE. It applies a softmax to its input, so it gets the logarithms of the shares.

    The softmax makes the shares sum to 1. The result is multiplied by their true sum.
    """
    hidden, routing, gate_up, down = node.inputs
    smallest = {ir.DataType.FLOAT: 1e-37, ir.DataType.FLOAT16: 6e-8}[gate_up.dtype]  # its logarithm is finite
    floor = add_initializer(node.graph, ir.tensor(smallest, dtype=gate_up.dtype, name="smallest_share"))
    axis = add_initializer(node.graph, ir.tensor([1], name="axis_of_experts"))
    names = [parameter_name(x) for x in (gate_up, down)]
    matrices = [
        add_initializer(node.graph, ExpertsTensor(partial(_matrices, weights, name), x.dtype, x.shape, name))
        for name, x in zip(names, (gate_up, down), strict=True)
    ]
    above = ir.node("Max", [routing, floor])
    logarithms = ir.node("Log", above.outputs)
    attributes: dict[str, Any] = {"k": node.attributes.get_int("k"), "normalize_routing_weights": 1, **SWIGLU}
    arguments = [hidden, logarithms.outputs[0], matrices[0], None, matrices[1]]
    mixed = ir.node("MoE", arguments, attributes, domain=CONTRIB_DOMAIN)
    total = ir.node("ReduceSum", [routing, axis], {"keepdims": 1})
    return [above, logarithms, mixed, total, ir.node("Mul", [mixed.outputs[0], total.outputs[0]])]


def _quantized_experts(node: ir.Node, weights: Mapping[str, Any], blocks: Blocks) -> list[ir.Node]:
    """Emit QMoE. It gets the shares twice: as scores that choose the experts, and as the experts' weights."""
    hidden, routing, *matrices = node.inputs
    arguments: list[ir.Value | None] = []
    for matrix in matrices:
        name, (count, outputs, inputs) = parameter_name(matrix), matrix.shape.numpy()
        quantized = QuantizedExperts(partial(_coded, weights, name, blocks), blocks)
        bytes_, scales = (ir.Shape((count, outputs, n)) for n in (inputs * blocks.bits // 8, blocks.count(inputs)))
        parts = (
            ExpertsTensor(quantized.codes, ir.DataType.UINT8, bytes_, f"{name}.q{blocks.bits}"),
            ExpertsTensor(quantized.scales, matrix.dtype, scales, f"{name}.scales"),
        )
        arguments += [*(add_initializer(node.graph, part) for part in parts), None]
    attributes: dict[str, Any] = {
        "k": node.attributes.get_int("k"),
        "expert_weight_bits": blocks.bits,
        "block_size": blocks.block_size,
        "weights_prepacked": 0,
        **SWIGLU,
    }
    if matrices[0].dtype == ir.DataType.FLOAT:
        attributes["accuracy_level"] = INT8_ACTIVATIONS
    absent = [None] * 6  # a third matrix and zero points
    return [ir.node("QMoE", [hidden, routing, *arguments, *absent, routing], attributes, domain=CONTRIB_DOMAIN)]


def _coded(weights: Mapping[str, Any], name: str, blocks: Blocks) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the codes and scales of each expert, with their rows in the operators' order."""
    for index in range(len(weights[name])):
        codes, scales = coded(weights, name, blocks, index)
        yield (interleaved(codes), interleaved(scales)) if name.endswith(GATE_UP) else (codes, scales)


def _matrices(weights: Mapping[str, Any], name: str) -> Iterator[torch.Tensor]:
    """Yield the matrix of each expert, with its rows in the operators' order."""
    for matrix in weights[name]:
        yield interleaved(matrix.detach()) if name.endswith(GATE_UP) else matrix.detach()
