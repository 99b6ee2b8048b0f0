"""Helpers for passes over the traced graph: find weights, add initializers, replace values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from optimum_lfm2.caches import CacheTensor, read_cache_tensors
from optimum_lfm2.graph.ops import LINEAR_OP, PLACEHOLDER_DOMAIN
from optimum_lfm2.weights.blocks import TABLES


CONTRIB_DOMAIN = "com.microsoft"


def is_parameter(value: ir.Value | None) -> bool:
    """Return whether a value is the placeholder of a weight."""
    node = value.producer() if value is not None else None
    return node is not None and node.domain == PLACEHOLDER_DOMAIN


def parameter_names(value: ir.Value) -> list[str]:
    """Return the checkpoint's names of the weights that a placeholder stands for. They are joined in this order."""
    return list(value.producer().attributes.get_strings("names"))


def parameter_name(value: ir.Value) -> str:
    """Return the name of the weight that a placeholder stands for: that of the checkpoint, or one for joined weights.

    The weights `attention.q.weight` and `attention.k.weight` are joined as `attention.q+k.weight`.
    """
    first, *others = parameter_names(value)
    if not others:
        return first
    parts = [name.rpartition(".")[0].rpartition(".")[2] for name in (first, *others)]
    return first.replace(f".{parts[0]}.", f".{'+'.join(parts)}.")


def read_parameter(weights: Mapping[str, Any], value: ir.Value) -> torch.Tensor:
    """Read the weight that a placeholder stands for. Joined weights are read one after the other."""
    first, *others = (weights[name].detach() for name in parameter_names(value))
    return torch.cat([first, *others]) if others else first


def add_initializer(graph: ir.Graph, tensor: Any) -> ir.Value:
    """Return the graph's initializer with the tensor's name. Add one with this tensor if the graph has none.

    Args:
        graph: the traced graph.
        tensor: a tensor of onnx-ir. A lazy one reads its values only when the file is written.
    """
    if tensor.name not in graph.initializers:
        kind = ir.TensorType(tensor.dtype)
        graph.register_initializer(ir.Value(name=tensor.name, shape=tensor.shape, type=kind, const_value=tensor))
    return graph.initializers[tensor.name]


def is_linear(node: ir.Node) -> bool:
    """Return whether a node is the placeholder of a linear layer."""
    return (node.domain, node.op_type) == (PLACEHOLDER_DOMAIN, LINEAR_OP)


def embeddings(graph: ir.Graph) -> list[ir.Node]:
    """Return the nodes that read rows of an embedding."""
    return [node for node in graph if node.op_type == "Gather" and is_parameter(node.inputs[0])]


def table_names(graph: ir.Graph) -> set[str]:
    """Return the names of the matrices that have a row for each id: the head's and the embedding's.

    A tied head has the embedding's name, even in a graph without an embedding.
    """
    linear = (parameter_name(node.inputs[1]) for node in graph if is_linear(node))
    tables = (parameter_name(node.inputs[0]) for node in embeddings(graph))
    return {*tables, *(name for name in linear if name.endswith(TABLES))}


def constant(tape: ir.tape.Tape, value: int | Sequence[int]) -> ir.Value:
    """Emit an int64 constant: a scalar for a number, a vector for a sequence."""
    return tape.op("Constant", [], {"value": ir.tensor(np.array(value, dtype=np.int64))})


def insert(
    before: ir.Node,
    operator: str,
    inputs: Sequence[ir.Value | None],
    attributes: Mapping[str, int] | None = None,
    domain: str = "",
) -> ir.Value:
    """Insert a new node before another, and return its output."""
    node = ir.node(operator, inputs, attributes, domain=domain)
    before.graph.insert_before(before, node)
    return node.outputs[0]


def substitute(node: ir.Node, result: ir.Value) -> None:
    """Replace the only output of a node by `result`, and remove the node."""
    output = node.outputs[0]
    result.name, result.type, result.shape = output.name, output.type, output.shape
    output.replace_all_uses_with(result, replace_graph_outputs=True)
    node.graph.remove(node, safe=True)


def split_linear(node: ir.Node, rows: Sequence[tuple[str, int]]) -> list[ir.Node]:
    """Replace a linear layer of joined weights by one for each weight, and join their outputs.

    Args:
        node: the placeholder of the layer.
        rows: the weights' names in order, each with its number of rows.

    Returns:
        The placeholders of the new layers.
    """
    x, joined, *bias = node.inputs
    parts, leading = [], list(node.outputs[0].shape or ())[:-1]
    for name, count in rows:
        attributes: dict[str, Any] = {"names": [name], "kernel": 0}
        weight = insert(node, joined.producer().op_type, [], attributes, PLACEHOLDER_DOMAIN)
        weight.type, weight.shape = joined.type, ir.Shape((count, joined.shape.numpy()[1]))
        part = insert(node, LINEAR_OP, [x, weight], domain=PLACEHOLDER_DOMAIN)
        part.type, part.shape = node.outputs[0].type, ir.Shape((*leading, count))
        parts.append(part)
    result = insert(node, "Concat", parts, {"axis": -1})
    substitute(node, insert(node, "Add", [result, *bias]) if bias else result)
    return [part.producer() for part in parts]


def graph_cache_tensors(graph: ir.Graph) -> list[CacheTensor]:
    """Return the cache tensors that a graph declares.

    Raises:
        Lfm2Error: a cache input has no matching output, or a cache output has no matching input.
    """
    inputs = {value.name: tuple(value.shape or ()) for value in graph.inputs}
    return read_cache_tensors(inputs, [value.name for value in graph.outputs])
