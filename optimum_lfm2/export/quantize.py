"""Make a graph read its linear layers' and its embedding's weights in 4 or 8 bits.

`weights/blocks.py` has the arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor

from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.graph.editing import (
    CONTRIB_DOMAIN,
    add_initializer,
    embeddings,
    insert,
    is_linear,
    parameter_name,
    parameter_names,
    split_linear,
    substitute,
    table_names,
)
from optimum_lfm2.weights.blocks import INT8_ACTIVATIONS, Blocks, Scheme, pack
from optimum_lfm2.weights.checkpoint import is_finite
from optimum_lfm2.weights.coded import coded


@dataclass
class Quantizer:
    """A pass that replaces linear layers and the embedding by nodes that read quantised weights.

    Attributes:
        graph: the traced graph.
        weights: each parameter by its name. A tensor is read and quantised only when the file is written.
        scheme: how the weights are quantised.
        views: after the pass, the values that share the bytes of an initializer, with the initializer's name.
    """

    graph: ir.Graph
    weights: Mapping[str, torch.Tensor]
    scheme: Scheme
    views: dict[ir.Value, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # The codes and the scales of a weight are written one after the other. This quantises it once for both.
        self._quantized = lru_cache(maxsize=1)(self._quantize)

    def run(self) -> None:
        """Change the graph. Writing the file raises `Lfm2Error` for a weight with values that are not finite."""
        self._tables = table_names(self.graph)
        for node in [node for node in self.graph if is_linear(node)]:
            for part in self._alike(node):
                if self._blocks(parameter_names(part.inputs[1])[0]) is not None:
                    self._linear(part)
        if self.scheme.embedding != "float":
            for node in embeddings(self.graph):
                if self._blocks(parameter_name(node.inputs[0])) is not None:
                    self._embedding(node)

    def _blocks(self, name: str) -> Blocks | None:
        return self.scheme.layer(name, table=name in self._tables)

    def _alike(self, node: ir.Node) -> list[ir.Node]:
        """Return a linear layer, or parts of it if its joined weights are not stored alike, as in some GGUF files."""
        names = parameter_names(node.inputs[1])
        if len(set(map(self._blocks, names))) == 1:
            return [node]
        return split_linear(node, [(name, len(self.weights[name])) for name in names])

    def _linear(self, node: ir.Node) -> None:
        x, weight = node.inputs[:2]
        outputs, inputs = weight.shape.numpy()
        packed, scales = self._initializers(weight)
        bias = node.inputs[2:]
        blocks = self._blocks(parameter_names(weight)[0])
        attributes = {"K": inputs, "N": outputs, "bits": blocks.bits, "block_size": blocks.block_size}
        if weight.dtype == ir.DataType.FLOAT and not self.scheme.float_activations:
            attributes["accuracy_level"] = INT8_ACTIVATIONS
        arguments = [x, packed, scales, *((None, None, *bias) if bias else ())]
        substitute(node, insert(node, "MatMulNBits", arguments, attributes, CONTRIB_DOMAIN))

    def _embedding(self, node: ir.Node) -> None:
        table, _ = node.inputs
        width, blocks = table.shape.numpy()[1], self._blocks(parameter_name(table))
        read = self._portable_rows if self.scheme.embedding == "portable" else self._fused_rows
        rows = read(node)
        if width % blocks.block_size == 0:
            substitute(node, rows)
            return
        name = parameter_name(table)
        bounds = [self._constant(f"{name}.{part}", value) for part, value in (("from", 0), ("to", width), ("axis", -1))]
        substitute(node, insert(node, "Slice", [rows, *bounds]))

    def _fused_rows(self, node: ir.Node) -> ir.Value:
        """Read the embedding's rows in float by GatherBlockQuantized. They include the padding of the last block."""
        table, ids = node.inputs
        packed, scales = self._initializers(table)
        rows, count, size = packed.shape.numpy()
        flat = ir.Value(name=f"{packed.name}.flat", shape=ir.Shape((rows, count * size)), type=packed.type)
        self.views[flat] = packed.name
        blocks = self._blocks(parameter_name(table))
        attributes = {"gather_axis": 0, "quantize_axis": 1, "bits": blocks.bits, "block_size": blocks.block_size}
        return insert(node, "GatherBlockQuantized", [flat, ids, scales], attributes, CONTRIB_DOMAIN)

    def _portable_rows(self, node: ir.Node) -> ir.Value:
        """Read the same rows by standard operators of ONNX."""
        table, ids = node.inputs
        packed, scales = self._initializers(table)
        name, blocks, last_axis = packed.name, self._blocks(parameter_name(table)), self._constant("last_axis", -1)
        codes = insert(node, "Cast", [insert(node, "Gather", [packed, ids])], {"to": int(table.dtype)})
        if blocks.bits == 4:
            codes = self._unpacked(node, codes, last_axis, blocks.block_size)
        zero_point = self._constant(f"{name}.zero_point", blocks.zero_point, table.dtype)
        centred = insert(node, "Sub", [codes, zero_point])
        scale = insert(node, "Unsqueeze", [insert(node, "Gather", [scales, ids]), last_axis])
        rows = add_initializer(self.graph, ir.tensor([0, 0, -1], name="row_shape"))
        return insert(node, "Reshape", [insert(node, "Mul", [centred, scale]), rows])

    def _unpacked(self, node: ir.Node, packed: ir.Value, last_axis: ir.Value, block_size: int) -> ir.Value:
        """Unpack the two codes of each byte: float (..., blocks, blob_size) to (..., blocks, block_size)."""
        sixteen = self._constant("codes_of_4_bits", 16, node.inputs[0].dtype)
        high = insert(node, "Floor", [insert(node, "Div", [packed, sixteen])])
        low = insert(node, "Sub", [packed, insert(node, "Mul", [high, sixteen])])
        pair = [insert(node, "Unsqueeze", [codes, last_axis]) for codes in (low, high)]
        shape = add_initializer(self.graph, ir.tensor([0, 0, 0, block_size], name="block_shape"))
        return insert(node, "Reshape", [insert(node, "Concat", pair, {"axis": -1}), shape])

    def _initializers(self, weight: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Return the packed codes and the scales of a weight. All nodes that read the weight share them."""
        name = parameter_name(weight)
        blocks, (rows, width) = self._blocks(parameter_names(weight)[0]), weight.shape.numpy()
        count = blocks.count(width)
        return (
            self._initializer(f"{name}.q{blocks.bits}", ir.DataType.UINT8, (rows, count, blocks.blob_size), weight, 0),
            self._initializer(f"{name}.scales", weight.dtype, (rows, count), weight, 1),
        )

    def _initializer(
        self, name: str, dtype: ir.DataType, shape: tuple[int, ...], weight: ir.Value, part: int
    ) -> ir.Value:
        read = partial(self._part, tuple(parameter_names(weight)), part)
        return add_initializer(self.graph, ir.LazyTensor(read, dtype=dtype, shape=ir.Shape(shape), name=name))

    def _part(self, names: tuple[str, ...], part: int) -> ir.TensorProtocol:
        return TorchTensor(self._quantized(names)[part])

    def _quantize(self, names: tuple[str, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """The codes and scales of weights, joined. A block lies in one row, so each has the codes that it has alone."""
        parts = []
        for name in names:
            weight, blocks = self.weights[name].detach(), self._blocks(name)
            if not is_finite(weight):
                raise Lfm2Error(
                    f"{name} holds values that are not finite numbers in {weight.dtype}, so it cannot be quantised. "
                    "Export in float, or repair the checkpoint."
                )
            codes, scales = coded(self.weights, name, blocks)
            parts.append((pack(codes, blocks), scales))
        if len(parts) == 1:
            return parts[0]
        all_codes, all_scales = zip(*parts, strict=True)
        return torch.cat(all_codes), torch.cat(all_scales)

    def _constant(self, name: str, value: int, dtype: ir.DataType = ir.DataType.INT64) -> ir.Value:
        return add_initializer(self.graph, ir.tensor([value], dtype, name=name))
