"""Weights in 4 or 8 bits: the arithmetic of one tensor, and which weights of a model are stored so.

A row of a weight is cut into blocks, each with one scale and no zero point: w ≈ (code - 2^(bits - 1)) * scale.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F


HEAD = "lm_head"
INT8_ACTIVATIONS = 4  # MatMulNBits' accuracy_level: on a CPU much faster than without
VALUES_AT_ONCE = 1 << 18  # what the arithmetic works on fits into a processor's cache
# Codes tried for each block, by how far its largest value goes towards the end of the range; more of them gain nothing.
STRETCHES = (0.9, 1.0, 1.1)


@dataclass(frozen=True)
class Blocks:
    """How one weight is stored: `bits` (4 or 8) a value, a scale for every `block_size` (a power of two from 16 on)."""

    bits: int
    block_size: int

    @property
    def zero_point(self) -> int:
        return 1 << (self.bits - 1)

    @property
    def blob_size(self) -> int:
        """Bytes of a block."""
        return self.block_size * self.bits // 8

    def count(self, width: int) -> int:
        """Blocks of a row; the last may be padded."""
        return -(-width // self.block_size)


@dataclass(frozen=True)
class Scheme:
    """How a model is quantised.

    Attributes:
        linear: the linear layers of the decoder.
        table: the head and the embedding, tied or not.
        embedding: one of `EMBEDDINGS`.
    """

    linear: Blocks
    table: Blocks
    embedding: str = "fused"


# How the graph reads an embedding: by `GatherBlockQuantized`; by operators that every build of onnxruntime has; or the
# table stays in float. The first two read the same bytes, the head's where the two are tied.
EMBEDDINGS = ("fused", "portable", "float")

# Decided by measurement: docs/quantization.md.
SCHEMES = {
    "q4": Scheme(linear=Blocks(4, 128), table=Blocks(8, 128)),
    "q4s": Scheme(linear=Blocks(4, 128), table=Blocks(4, 32)),
    "q8": Scheme(linear=Blocks(8, 128), table=Blocks(8, 128)),
}


def quantize_tensor(weight: torch.Tensor, blocks: Blocks) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, in), float → codes, uint8 (out, blocks, block_size), and scales (out, blocks) of the weight's dtype."""
    padded = F.pad(weight, (0, -weight.shape[1] % blocks.block_size)).unflatten(1, (-1, blocks.block_size))
    rows = max(1, VALUES_AT_ONCE // weight.shape[1])
    codes, scales = zip(*(_quantize(part.float(), blocks, weight.dtype) for part in padded.split(rows)), strict=True)
    return torch.cat(codes), torch.cat(scales)


def _quantize(values: torch.Tensor, blocks: Blocks, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Several sets of codes, for each the scale of least squares, and of these the best."""
    low, high = values.amin(-1), values.amax(-1)
    extreme = torch.where(-low > high, low, high)  # gets the code 0, the one that has no opposite
    scales, best = torch.zeros_like(extreme), torch.zeros_like(extreme)
    for stretch in STRETCHES:
        codes = _codes(values, -extreme / (stretch * blocks.zero_point), blocks)
        along, length = torch.linalg.vecdot(codes, values), torch.linalg.vecdot(codes, codes)
        gain = torch.where(length == 0, 0, along * along / length)  # the squares that the best scale explains
        scales, best = torch.where(gain > best, along / length, scales), torch.maximum(gain, best)
    scales = scales.to(dtype)
    return _codes(values, scales.float(), blocks).add_(blocks.zero_point).to(torch.uint8), scales


def _codes(values: torch.Tensor, scales: torch.Tensor, blocks: Blocks) -> torch.Tensor:
    inverse = torch.where(scales == 0, 0, 1 / scales)
    return (values * inverse[..., None]).round_().clamp_(-blocks.zero_point, blocks.zero_point - 1)


def dequantize_tensor(codes: torch.Tensor, scales: torch.Tensor, width: int, blocks: Blocks) -> torch.Tensor:
    """The inverse of `quantize_tensor`: (out, width), of the scales' dtype."""
    values = (codes.to(scales.dtype) - blocks.zero_point) * scales[..., None]
    return values.flatten(1)[:, :width].contiguous()


def rounded(weight: torch.Tensor, blocks: Blocks | None) -> torch.Tensor:
    """A weight, (out, in), as it is once quantised; None: as it is."""
    if blocks is None:
        return weight
    return dequantize_tensor(*quantize_tensor(weight, blocks), weight.shape[1], blocks)


def pack(codes: torch.Tensor, blocks: Blocks) -> torch.Tensor:
    """uint8 (out, blocks, block_size) → (out, blocks, blob_size): two codes of 4 bits a byte, the first one low."""
    return codes if blocks.bits == 8 else codes[..., 0::2] | codes[..., 1::2] << 4


def module_blocks(model: torch.nn.Module, scheme: Scheme) -> dict[Any, Blocks]:
    """How the graph stores the weight of each module of transformers' model that it quantises."""
    head, blocks = getattr(model, HEAD, None), {}
    for module in model.modules():
        embeds = isinstance(module, torch.nn.Embedding) and scheme.embedding != "float"
        if module is head or embeds:
            blocks[module] = scheme.table
        elif isinstance(module, torch.nn.Linear):
            blocks[module] = scheme.linear
    return blocks


@contextmanager
def dequantized(model: torch.nn.Module, scheme: Scheme | None) -> Iterator[None]:
    """Within the block, `model` computes with the values that its quantised graph stands for."""
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
