"""Weights in 4 or 8 bits: the arithmetic of one tensor, and the graph whose linear layers and embedding read them.

A row of a weight is cut into blocks, each with one scale and no zero point: w ≈ (code - 2^(bits - 1)) * scale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial

import onnx_ir as ir
import torch
import torch.nn.functional as F
from onnx_ir.tensor_adapters import TorchTensor

from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.export.ops import PLACEHOLDER_DOMAIN


CONTRIB_DOMAIN = "com.microsoft"
INT8_ACTIVATIONS = 4  # MatMulNBits' accuracy_level: on a CPU three times faster than without
ROWS_AT_ONCE = 1024  # bounds the memory that the arithmetic takes beside the tensor


@dataclass(frozen=True)
class Scheme:
    """How a model is quantised.

    Attributes:
        bits: 4 or 8.
        block_size: values that share a scale: a power of two, 16 at least.
        float_embedding: keep the embedding in float, for runtimes without a kernel for `GatherBlockQuantized`.
    """

    bits: int
    block_size: int
    float_embedding: bool = False

    @property
    def zero_point(self) -> int:
        return 1 << (self.bits - 1)

    def blocks(self, width: int) -> int:
        return -(-width // self.block_size)

    @property
    def blob_size(self) -> int:
        return self.block_size * self.bits // 8


VARIANTS = {
    "q4": Scheme(bits=4, block_size=32),
    "q8": Scheme(bits=8, block_size=32),
}


def quantize_tensor(weight: torch.Tensor, scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, in), float → codes, uint8 (out, blocks, block_size), and scales (out, blocks) of the weight's dtype."""
    padded = F.pad(weight, (0, -weight.shape[1] % scheme.block_size)).unflatten(1, (-1, scheme.block_size))
    pieces = [_quantize_blocks(piece.float(), scheme, weight.dtype) for piece in padded.split(ROWS_AT_ONCE)]
    codes, scales = zip(*pieces, strict=True)
    return torch.cat(codes), torch.cat(scales)


def _quantize_blocks(blocks: torch.Tensor, scheme: Scheme, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    low, high = blocks.amin(-1), blocks.amax(-1)
    extreme = torch.where(-low > high, low, high)  # gets the code 0, the one that has no opposite
    scales = (extreme / -scheme.zero_point).to(dtype)
    inverse = torch.where(scales == 0, 0, 1 / scales.float())
    codes = (blocks * inverse[..., None]).round_().add_(scheme.zero_point).clamp_(0, 2 * scheme.zero_point - 1)
    return codes.to(torch.uint8), scales


def dequantize_tensor(codes: torch.Tensor, scales: torch.Tensor, width: int, scheme: Scheme) -> torch.Tensor:
    """The inverse of `quantize_tensor`: (out, width), of the scales' dtype."""
    values = (codes.to(scales.dtype) - scheme.zero_point) * scales[..., None]
    return values.flatten(1)[:, :width].contiguous()


def pack(codes: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """uint8 (out, blocks, block_size) → (out, blocks, blob_size): two codes of 4 bits a byte, the first one low."""
    return codes if scheme.bits == 8 else codes[..., 0::2] | codes[..., 1::2] << 4


@contextmanager
def dequantized(model: torch.nn.Module, scheme: Scheme | None) -> Iterator[None]:
    """Within the block, `model` computes with the values that its quantised graph stands for."""
    if scheme is None:
        yield
        return
    kinds = torch.nn.Linear if scheme.float_embedding else (torch.nn.Linear, torch.nn.Embedding)
    modules = [module for module in model.modules() if isinstance(module, kinds)]
    originals = [module.weight for module in modules]
    replaced: dict[int, torch.nn.Parameter] = {}
    try:
        for module, original in zip(modules, originals, strict=True):
            if id(original) not in replaced:
                values = dequantize_tensor(*quantize_tensor(original.detach(), scheme), original.shape[1], scheme)
                replaced[id(original)] = torch.nn.Parameter(values, requires_grad=False)
            module.weight = replaced[id(original)]
        yield
    finally:
        for module, original in zip(modules, originals, strict=True):
            module.weight = original


@dataclass
class Quantizer:
    """Replaces a graph's linear layers and its embedding by nodes that read quantised weights.

    Attributes:
        weights: each parameter by its name; a tensor is read and quantised when the file is written.
        views: after the pass, values that are to read the bytes of another initializer, with the name of that one.
    """

    graph: ir.Graph
    weights: Mapping[str, torch.Tensor]
    scheme: Scheme
    views: dict[ir.Value, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Two initializers come of one weight, one after the other: it is quantised once.
        self._quantized = lru_cache(maxsize=1)(self._quantize)

    def run(self) -> None:
        embeddings = []
        for node in list(self.graph):
            if node.op_type == "Gemm" and _is_parameter(node.inputs[1]):
                self._linear(node)
            elif node.op_type == "Gather" and _is_parameter(node.inputs[0]):
                embeddings.append(node)
        if not self.scheme.float_embedding:
            for node in embeddings:
                self._embedding(node)

    def _linear(self, node: ir.Node) -> None:
        x, weight = node.inputs[:2]
        outputs, inputs = weight.shape.numpy()
        packed, scales = self._initializers(weight)
        bias = node.inputs[2:]
        attributes = {"K": inputs, "N": outputs, "bits": self.scheme.bits, "block_size": self.scheme.block_size}
        if weight.dtype == ir.DataType.FLOAT:
            attributes["accuracy_level"] = INT8_ACTIVATIONS
        arguments = [x, packed, scales, *((None, None, *bias) if bias else ())]
        self._replace(node, ir.node("MatMulNBits", arguments, attributes, domain=CONTRIB_DOMAIN))

    def _embedding(self, node: ir.Node) -> None:
        table, ids = node.inputs
        rows, width = table.shape.numpy()
        name, scheme = f"{_parameter_name(table)}.q{self.scheme.bits}", self.scheme
        shape = ir.Shape((rows, scheme.blocks(width) * scheme.blob_size))
        packed, scales = self._initializers(table)
        flat = ir.Value(name=f"{name}.flat", shape=shape, type=packed.type)
        self.views[flat] = name
        attributes = {"gather_axis": 0, "quantize_axis": 1, "bits": scheme.bits, "block_size": scheme.block_size}
        gather = ir.node("GatherBlockQuantized", [flat, ids, scales], attributes, domain=CONTRIB_DOMAIN)
        if width % scheme.block_size == 0:
            self._replace(node, gather)
            return
        self.graph.insert_before(node, gather)
        bounds = [self._constant(f"{name}.{part}", value) for part, value in (("from", 0), ("to", width), ("axis", 1))]
        self._replace(node, ir.node("Slice", [gather.outputs[0], *bounds]))

    def _initializers(self, weight: ir.Value) -> tuple[ir.Value, ir.Value]:
        """The packed codes and the scales of a weight; the same for every node that reads it."""
        name, scheme = _parameter_name(weight), self.scheme
        rows, width = weight.shape.numpy()
        blocks = scheme.blocks(width)
        return (
            self._initializer(f"{name}.q{scheme.bits}", ir.DataType.UINT8, (rows, blocks, scheme.blob_size), name, 0),
            self._initializer(f"{name}.scales", weight.dtype, (rows, blocks), name, 1),
        )

    def _initializer(self, name: str, dtype: ir.DataType, shape: tuple[int, ...], weight: str, part: int) -> ir.Value:
        if name not in self.graph.initializers:
            register(self.graph, name, dtype, ir.Shape(shape), lambda: TorchTensor(self._quantized(weight)[part]))
        return self.graph.initializers[name]

    def _quantize(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        weight = self.weights[name].detach()
        if not weight.isfinite().all():
            raise Lfm2Error(
                f"{name} holds values that are not finite numbers in {weight.dtype}; it cannot be quantised."
            )
        codes, scales = quantize_tensor(weight, self.scheme)
        return pack(codes, self.scheme), scales

    def _constant(self, name: str, value: int) -> ir.Value:
        register(self.graph, name, ir.DataType.INT64, ir.Shape((1,)), partial(ir.tensor, [value]))
        return self.graph.initializers[name]

    def _replace(self, old: ir.Node, new: ir.Node) -> None:
        output, result = old.outputs[0], new.outputs[0]
        result.name, result.type, result.shape = output.name, output.type, output.shape
        self.graph.insert_before(old, new)
        output.replace_all_uses_with(result)
        self.graph.remove(old, safe=True)


def register(
    graph: ir.Graph, name: str, dtype: ir.DataType, shape: ir.Shape, read: Callable[[], ir.TensorProtocol]
) -> None:
    """Add an initializer that reads its values only while the file is written."""
    tensor = ir.LazyTensor(read, dtype=dtype, shape=shape, name=name)
    graph.register_initializer(ir.Value(name=name, shape=shape, type=ir.TensorType(dtype), const_value=tensor))


def _is_parameter(value: ir.Value | None) -> bool:
    node = value.producer() if value is not None else None
    return node is not None and node.domain == PLACEHOLDER_DOMAIN


def _parameter_name(value: ir.Value) -> str:
    return value.producer().attributes.get_string("name")
