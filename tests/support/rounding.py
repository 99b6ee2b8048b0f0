"""Plain rounding, with which our quantised weights are compared."""

from __future__ import annotations

import torch


def to_nearest(weight: torch.Tensor, bits: int, block_size: int) -> torch.Tensor:
    """Round to nearest, with the largest value of each block at the end of the range. No quantiser may be worse.

    Args:
        weight: float (out, in). `in` is a multiple of `block_size`.

    Returns:
        The dequantised weight, of the same shape.
    """
    blocks = weight.unflatten(1, (-1, block_size))
    low, high = blocks.amin(-1), blocks.amax(-1)
    scales = torch.where(-low > high, low, high) / -(1 << (bits - 1))
    codes = (blocks / scales[..., None]).round().clamp(-(1 << (bits - 1)), (1 << (bits - 1)) - 1)
    return (codes * scales[..., None]).flatten(1)
