"""Make a graph read its linear layers' and its embedding's weights in 4 or 8 bits.

`weights/blocks.py` has the arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor

from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.graph.editing import CONTRIB_DOMAIN, add_initializer, is_parameter, parameter_name, substitute
from optimum_lfm2.weights.blocks import INT8_ACTIVATIONS, TABLES, Blocks, Scheme, pack, quantize_tensor


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
        nodes = list(self.graph)
        linears = [node for node in nodes if node.op_type == "Gemm" and is_parameter(node.inputs[1])]
        embeddings = [node for node in nodes if node.op_type == "Gather" and is_parameter(node.inputs[0])]
        for node in linears:
            self._linear(node)
        if self.scheme.embedding != "float":
            for node in embeddings:
                self._embedding(node)

    def _blocks(self, name: str) -> Blocks:
        return self.scheme.table if name.endswith(TABLES) else self.scheme.linear

    def _linear(self, node: ir.Node) -> None:
        x, weight = node.inputs[:2]
        outputs, inputs = weight.shape.numpy()
        packed, scales = self._initializers(weight)
        bias = node.inputs[2:]
        blocks = self._blocks(parameter_name(weight))
        attributes = {"K": inputs, "N": outputs, "bits": blocks.bits, "block_size": blocks.block_size}
        if weight.dtype == ir.DataType.FLOAT and not self.scheme.float_activations:
            attributes["accuracy_level"] = INT8_ACTIVATIONS
        arguments = [x, packed, scales, *((None, None, *bias) if bias else ())]
        substitute(node, self._added(node, "MatMulNBits", arguments, attributes, CONTRIB_DOMAIN))

    def _embedding(self, node: ir.Node) -> None:
        table, _ = node.inputs
        width, blocks = table.shape.numpy()[1], self.scheme.table
        read = self._portable_rows if self.scheme.embedding == "portable" else self._fused_rows
        rows = read(node)
        if width % blocks.block_size == 0:
            substitute(node, rows)
            return
        name = parameter_name(table)
        bounds = [self._constant(f"{name}.{part}", value) for part, value in (("from", 0), ("to", width), ("axis", 1))]
        substitute(node, self._added(node, "Slice", [rows, *bounds]))

    def _fused_rows(self, node: ir.Node) -> ir.Value:
        """Read the embedding's rows in float by GatherBlockQuantized. They include the padding of the last block."""
        table, ids = node.inputs
        packed, scales = self._initializers(table)
        rows, count, size = packed.shape.numpy()
        flat = ir.Value(name=f"{packed.name}.flat", shape=ir.Shape((rows, count * size)), type=packed.type)
        self.views[flat] = packed.name
        blocks = self.scheme.table
        attributes = {"gather_axis": 0, "quantize_axis": 1, "bits": blocks.bits, "block_size": blocks.block_size}
        return self._added(node, "GatherBlockQuantized", [flat, ids, scales], attributes, CONTRIB_DOMAIN)

    def _portable_rows(self, node: ir.Node) -> ir.Value:
        """Read the same rows by standard operators of ONNX."""
        table, ids = node.inputs
        packed, scales = self._initializers(table)
        name, blocks, last_axis = packed.name, self.scheme.table, self._constant("last_axis", -1)
        codes = self._added(node, "Cast", [self._added(node, "Gather", [packed, ids])], {"to": int(table.dtype)})
        if blocks.bits == 4:
            codes = self._unpacked(node, codes, last_axis)
        zero_point = self._constant(f"{name}.zero_point", blocks.zero_point, table.dtype)
        centred = self._added(node, "Sub", [codes, zero_point])
        scale = self._added(node, "Unsqueeze", [self._added(node, "Gather", [scales, ids]), last_axis])
        return self._added(node, "Flatten", [self._added(node, "Mul", [centred, scale])], {"axis": 1})

    def _unpacked(self, node: ir.Node, packed: ir.Value, last_axis: ir.Value) -> ir.Value:
        """Unpack the two codes of each byte: float (tokens, blocks, blob_size) to (tokens, blocks, block_size)."""
        sixteen = self._constant("codes_of_4_bits", 16, node.inputs[0].dtype)
        high = self._added(node, "Floor", [self._added(node, "Div", [packed, sixteen])])
        low = self._added(node, "Sub", [packed, self._added(node, "Mul", [high, sixteen])])
        pair = [self._added(node, "Unsqueeze", [codes, last_axis]) for codes in (low, high)]
        shape = add_initializer(self.graph, ir.tensor([0, 0, self.scheme.table.block_size], name="block_shape"))
        return self._added(node, "Reshape", [self._added(node, "Concat", pair, {"axis": -1}), shape])

    def _initializers(self, weight: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Return the packed codes and the scales of a weight. All nodes that read the weight share them."""
        name = parameter_name(weight)
        blocks, (rows, width) = self._blocks(name), weight.shape.numpy()
        count = blocks.count(width)
        return (
            self._initializer(f"{name}.q{blocks.bits}", ir.DataType.UINT8, (rows, count, blocks.blob_size), name, 0),
            self._initializer(f"{name}.scales", weight.dtype, (rows, count), name, 1),
        )

    def _initializer(self, name: str, dtype: ir.DataType, shape: tuple[int, ...], weight: str, part: int) -> ir.Value:
        read = partial(self._part, weight, part)
        return add_initializer(self.graph, ir.LazyTensor(read, dtype=dtype, shape=ir.Shape(shape), name=name))

    def _part(self, name: str, part: int) -> ir.TensorProtocol:
        return TorchTensor(self._quantized(name)[part])

    def _quantize(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        weight = self.weights[name].detach()
        if not weight.isfinite().all():
            raise Lfm2Error(
                f"{name} holds values that are not finite numbers in {weight.dtype}, so it cannot be quantised. "
                "Export in float, or repair the checkpoint."
            )
        blocks = self._blocks(name)
        codes, scales = quantize_tensor(weight, blocks)
        return pack(codes, blocks), scales

    def _constant(self, name: str, value: int, dtype: ir.DataType = ir.DataType.INT64) -> ir.Value:
        return add_initializer(self.graph, ir.tensor([value], dtype, name=name))

    def _added(
        self,
        before: ir.Node,
        operator: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, int] | None = None,
        domain: str = "",
    ) -> ir.Value:
        """Insert a new node before another, and return its output."""
        node = ir.node(operator, inputs, attributes, domain=domain)
        self.graph.insert_before(before, node)
        return node.outputs[0]
