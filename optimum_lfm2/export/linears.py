"""Linear layers whose weights stay in float. `quantize.py` has the others."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor

from optimum_lfm2.graph.editing import (
    add_initializer,
    insert,
    is_linear,
    parameter_name,
    read_parameter,
    substitute,
    table_names,
)


def place_linears(graph: ir.Graph, weights: Mapping[str, torch.Tensor]) -> None:
    """Replace each linear layer by a `MatMul`, and the head by a `Gemm`.

    `MatMul` takes hidden states as they are, and reads the matrix transposed. `Gemm` reads the matrix as the checkpoint
    has it, so the file has one tensor for a head and its tied embedding. `Gemm` takes inputs of two axes only.

    The types of products are declared for `optimum-cli onnxruntime quantize`. ONNX's shape inference cannot find them,
    since it stops at operators of other domains. `test_optimum_quantizes_the_result` shows it.

    Args:
        graph: the traced graph.
        weights: each parameter by its name in the checkpoint.
    """
    tables = table_names(graph)
    for node in [node for node in graph if is_linear(node)]:
        x, weight, *bias = node.inputs
        if parameter_name(weight) in tables:
            product = _head(node)
        else:
            product = insert(node, "MatMul", [x, _transposed(graph, weight, weights)])
            product.type, product.shape = ir.TensorType(weight.dtype), node.outputs[0].shape
        substitute(node, insert(node, "Add", [product, *bias]) if bias else product)


def _transposed(graph: ir.Graph, weight: ir.Value, weights: Mapping[str, torch.Tensor]) -> ir.Value:
    def read() -> ir.TensorProtocol:
        return TorchTensor(read_parameter(weights, weight).T.contiguous())

    shape = ir.Shape(weight.shape.numpy()[::-1])
    return add_initializer(graph, ir.LazyTensor(read, dtype=weight.dtype, shape=shape, name=parameter_name(weight)))


def _head(node: ir.Node) -> ir.Value:
    """Emit the head: (batch_size, kept, in) → (batch_size, kept, out), by a product over two axes."""
    x, weight, graph = *node.inputs[:2], node.graph
    outputs, inputs = weight.shape.numpy()
    flat, width = (
        add_initializer(graph, ir.tensor(values, name=f"{parameter_name(weight)}.{name}"))
        for name, values in (("tokens", [-1, inputs]), ("outputs", [outputs]))
    )
    tokens = insert(node, "Reshape", [x, flat])
    product = insert(node, "Gemm", [tokens, weight], {"transB": 1})
    product.type, product.shape = ir.TensorType(weight.dtype), ir.Shape((None, outputs))
    rows = insert(node, "Shape", [x], {"end": 2})
    return insert(node, "Reshape", [product, insert(node, "Concat", [rows, width], {"axis": 0})])
