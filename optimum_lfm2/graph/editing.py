"""What every pass over the traced graph does: read a placeholder's name, add a weight, put one value for another."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from optimum_lfm2.caches import CacheTensor, read_cache_tensors
from optimum_lfm2.graph.ops import PLACEHOLDER_DOMAIN


CONTRIB_DOMAIN = "com.microsoft"


def is_parameter(value: ir.Value | None) -> bool:
    """Whether a value stands for a weight of the checkpoint."""
    node = value.producer() if value is not None else None
    return node is not None and node.domain == PLACEHOLDER_DOMAIN


def parameter_name(value: ir.Value) -> str:
    """The checkpoint's name for what a placeholder stands for."""
    return value.producer().attributes.get_string("name")


def add_initializer(graph: ir.Graph, tensor: Any) -> ir.Value:
    """The initializer of the tensor's name: the graph's, else a new one.

    Args:
        tensor: one of onnx-ir's; a lazy one reads its values only while the file is written.
    """
    if tensor.name not in graph.initializers:
        kind = ir.TensorType(tensor.dtype)
        graph.register_initializer(ir.Value(name=tensor.name, shape=tensor.shape, type=kind, const_value=tensor))
    return graph.initializers[tensor.name]


def substitute(node: ir.Node, result: ir.Value) -> None:
    """Let `result`, which new nodes compute, take the place of a node's only output."""
    output = node.outputs[0]
    result.name, result.type, result.shape = output.name, output.type, output.shape
    output.replace_all_uses_with(result)
    node.graph.remove(node, safe=True)


def graph_cache_tensors(graph: ir.Graph) -> list[CacheTensor]:
    """The cache tensors that a graph declares, as `optimum_lfm2.caches.read_cache_tensors` reads them."""
    inputs = {value.name: tuple(value.shape or ()) for value in graph.inputs}
    return read_cache_tensors(inputs, [value.name for value in graph.outputs])
