"""Steps that passes over the traced graph share: find weights, add initializers, replace values."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from optimum_lfm2.caches import CacheTensor, read_cache_tensors
from optimum_lfm2.graph.ops import PLACEHOLDER_DOMAIN


CONTRIB_DOMAIN = "com.microsoft"


def is_parameter(value: ir.Value | None) -> bool:
    """Return whether a value is the placeholder of a weight."""
    node = value.producer() if value is not None else None
    return node is not None and node.domain == PLACEHOLDER_DOMAIN


def parameter_name(value: ir.Value) -> str:
    """Return the checkpoint's name of the weight that a placeholder stands for."""
    return value.producer().attributes.get_string("name")


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


def substitute(node: ir.Node, result: ir.Value) -> None:
    """Replace the only output of a node by `result`, and remove the node."""
    output = node.outputs[0]
    result.name, result.type, result.shape = output.name, output.type, output.shape
    output.replace_all_uses_with(result, replace_graph_outputs=True)
    node.graph.remove(node, safe=True)


def graph_cache_tensors(graph: ir.Graph) -> list[CacheTensor]:
    """Return the cache tensors that a graph declares.

    Raises:
        Lfm2Error: a cache input has no matching output, or a cache output has no matching input.
    """
    inputs = {value.name: tuple(value.shape or ()) for value in graph.inputs}
    return read_cache_tensors(inputs, [value.name for value in graph.outputs])
