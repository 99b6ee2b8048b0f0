"""Quantised weights, 4 or 8 bits: the arithmetic for one tensor, and the choice of which weights are quantised.

Each row of a weight is cut into blocks. A block has one scale and no zero point: w ≈ (code - 2^(bits - 1)) * scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F


HEAD = "lm_head"
# The names of the head's and the embedding's weights end so.
TABLES = (f"{HEAD}.weight", "embed_tokens.weight")
# The `accuracy_level` of MatMulNBits at which a CPU rounds activations to int8. In onnxruntime 1.32, 4-bit weights
# run about three times as fast with it as without. tests/test_claims.py shows the rounding.
INT8_ACTIVATIONS = 4
VALUES_AT_ONCE = 1 << 18  # the values of one step of the arithmetic fit into a processor's cache
# The quantiser tries one step size per entry for each block: the block's largest value then gets 0.9, 1.0 or 1.1 times
# the largest code. More entries gain nothing.
STRETCHES = (0.9, 1.0, 1.1)


@dataclass(frozen=True)
class Blocks:
    """How one weight is stored.

    Attributes:
        bits: 4 or 8, the bits of each code.
        block_size: how many values share a scale: a power of two, 16 or more.
    """

    bits: int
    block_size: int

    @property
    def zero_point(self) -> int:
        """The code that stands for 0."""
        return 1 << (self.bits - 1)

    @property
    def blob_size(self) -> int:
        """The bytes of a block's codes."""
        return self.block_size * self.bits // 8

    def count(self, width: int) -> int:
        """Return the number of blocks in a row of `width` values. The last block may be padded."""
        return -(-width // self.block_size)


@dataclass(frozen=True)
class Scheme:
    """How a model is quantised.

    Attributes:
        linear: how the linear layers of the decoder are stored. None leaves them in float.
        table: how the head and the embedding are stored, tied or not. None leaves them in float.
        embedding: how the graph reads the embedding, one of `EMBEDDINGS`.
        float_activations: whether a linear layer computes with activations in float, which is slower on a CPU.
        in_8_bits: endings of the names of linear layers that have 8 bits in place of `linear.bits`.
        stored: how a matrix is stored whatever the others are, by the name of its layer (`coded.keeping`).
    """

    linear: Blocks | None
    table: Blocks | None
    embedding: str = "fused"
    float_activations: bool = False
    in_8_bits: tuple[str, ...] = ()
    stored: Mapping[str, Blocks] = field(default_factory=dict, hash=False)

    def layer(self, name: str, table: bool | None = None) -> Blocks | None:
        """Return how a matrix is stored. None means in float.

        Args:
            name: the name of its layer, or of its weight.
            table: whether it is a head or an embedding. None asks the name.
        """
        layer = name.removesuffix(".weight")
        if layer in self.stored:
            return self.stored[layer]
        if f"{layer}.weight".endswith(TABLES) if table is None else table:
            return self.table
        if self.linear is not None and layer.endswith(self.in_8_bits):
            return replace(self.linear, bits=8)
        return self.linear


# How the graph reads an embedding. `fused` is the operator `GatherBlockQuantized`. `portable` uses operators that every
# build of onnxruntime has; the browser builds lack `GatherBlockQuantized` (Transformers.js 4.3.2, onnxruntime-web 1.31
# in its asyncify build). Both read the same bytes, which are the head's where embedding and head are tied. `float`
# leaves the embedding unquantised.
EMBEDDINGS = ("fused", "portable", "float")

# docs/quantization.md has the measurements that decided these block sizes and bits.
SCHEMES = {
    "q4": Scheme(linear=Blocks(4, 128), table=Blocks(8, 128)),
    "q4s": Scheme(linear=Blocks(4, 128), table=Blocks(4, 128)),
    "q8": Scheme(linear=Blocks(8, 128), table=Blocks(8, 128)),
}
# In half precision a file is for a GPU. Kernels of WebGPU that read a prompt in tiles, or join the projections of one
# token, take 4 bits in blocks of 32 alone (onnxruntime-web 1.31; docs/quantization.md). A head computes one token of a
# prompt, by a kernel that takes any blocks.
HALF_SCHEMES = {name: replace(SCHEMES[name], linear=Blocks(4, 32)) for name in ("q4", "q4s")}
# Nothing is asked for: a matrix stays in float, or has the codes of its checkpoint.
FLOAT = Scheme(linear=None, table=None)
# A vision tower is quantised to 8 bits whatever the decoder is, as LiquidAI ships it, with activations in float.
VISION_SCHEME = Scheme(linear=Blocks(8, 128), table=Blocks(8, 128), embedding="float", float_activations=True)


def scheme_of(variant: str, dtype: str) -> Scheme:
    """Return how a variant of the export quantises a model.

    Args:
        variant: a key of `SCHEMES`, or another variant, which asks for nothing.
        dtype: the dtype of the export, `fp32` or `fp16`.
    """
    schemes = SCHEMES | HALF_SCHEMES if dtype == "fp16" else SCHEMES
    return schemes.get(variant, FLOAT)


def quantize_tensor(weight: torch.Tensor, blocks: Blocks) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise a weight.

    Args:
        weight: float (out, in).
        blocks: how to store it.

    Returns:
        The codes, uint8 (out, blocks, block_size), and the scales, (out, blocks) of the weight's dtype.
    """
    padded = F.pad(weight, (0, -weight.shape[1] % blocks.block_size)).unflatten(1, (-1, blocks.block_size))
    rows = max(1, VALUES_AT_ONCE // weight.shape[1])
    codes, scales = zip(*(_quantize(part.float(), blocks, weight.dtype) for part in padded.split(rows)), strict=True)
    return torch.cat(codes), torch.cat(scales)


def _quantize(values: torch.Tensor, blocks: Blocks, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """For each block, compute the codes of several step sizes, fit a scale by least squares, and keep the best."""
    low, high = values.amin(-1), values.amax(-1)
    # The value of largest magnitude gets the code 0, since the range has one more code on that side.
    extreme = torch.where(-low > high, low, high)
    scales, best = torch.zeros_like(extreme), torch.zeros_like(extreme)
    for stretch in STRETCHES:
        codes = _codes(values, -extreme / (stretch * blocks.zero_point), blocks)
        along, length = torch.linalg.vecdot(codes, values), torch.linalg.vecdot(codes, codes)
        gain = torch.where(length == 0, 0, along * along / length)  # what the best scale takes off the squared error
        scales, best = torch.where(gain > best, along / length, scales), torch.maximum(gain, best)
    scales = scales.to(dtype)
    return _codes(values, scales.float(), blocks).add_(blocks.zero_point).to(torch.uint8), scales


def _codes(values: torch.Tensor, scales: torch.Tensor, blocks: Blocks) -> torch.Tensor:
    inverse = torch.where(scales == 0, 0, 1 / scales)
    return (values * inverse[..., None]).round_().clamp_(-blocks.zero_point, blocks.zero_point - 1)


def dequantize_tensor(codes: torch.Tensor, scales: torch.Tensor, width: int, blocks: Blocks) -> torch.Tensor:
    """Undo `quantize_tensor`.

    Args:
        codes: uint8 (out, blocks, block_size).
        scales: float (out, blocks).
        width: the columns of the weight, without the padding of the last block.
        blocks: how the weight is stored.

    Returns:
        The weight, (out, width), of the scales' dtype.
    """
    values = codes.to(scales.dtype).sub_(blocks.zero_point).mul_(scales[..., None])
    return values.flatten(1)[:, :width].contiguous()


def rounded(weight: torch.Tensor, blocks: Blocks | None) -> torch.Tensor:
    """Return a weight, float (out, in), with the values that it has after quantisation.

    With `blocks` None the weight comes back unchanged.
    """
    if blocks is None:
        return weight
    return dequantize_tensor(*quantize_tensor(weight, blocks), weight.shape[1], blocks)


def pack(codes: torch.Tensor, blocks: Blocks) -> torch.Tensor:
    """Pack codes for the file: uint8 (out, blocks, block_size) to (out, blocks, blob_size).

    A byte holds one code of 8 bits, or two codes of 4 bits with the first one in the low half.
    """
    return codes if blocks.bits == 8 else codes[..., 0::2] | codes[..., 1::2] << 4


def module_blocks(model: torch.nn.Module, scheme: Scheme) -> dict[Any, Blocks | None]:
    """Map each module whose weight the graph quantises to how that weight is stored.

    Args:
        model: a model of transformers.
        scheme: how it is quantised.
    """
    head, blocks = getattr(model, HEAD, None), {}
    for name, module in model.named_modules():
        embeds = isinstance(module, torch.nn.Embedding) and scheme.embedding != "float"
        if module is head or embeds:
            blocks[module] = scheme.layer(name, table=True)
        elif isinstance(module, torch.nn.Linear):
            blocks[module] = scheme.layer(name, table=False)
    return blocks
