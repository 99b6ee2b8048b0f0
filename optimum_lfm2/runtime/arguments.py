"""What callers hand to `forward` and `generate`, and what of it cannot be."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache

from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.runtime.cache import Lfm2Cache


def check_ids(ids: torch.Tensor) -> None:
    if ids.dim() != 2 or ids.numel() == 0 or ids.is_floating_point():
        raise Lfm2Error(
            f"input_ids has the shape {tuple(ids.shape)} and the type {ids.dtype}; it needs integers "
            "(batch_size, sequence_length), with one row and one token at least."
        )


def check_positions(positions: torch.Tensor | None, mask: torch.Tensor, new: int) -> None:
    """Raise `Lfm2Error` where positions of the new tokens are not those that the mask gives them."""
    if positions is None:
        return
    shown = mask[:, -new:] != 0
    expected = ((mask != 0).to(torch.int64).cumsum(1) - 1)[:, -new:]
    fits = positions.dim() == 2 and positions.shape[0] in (1, len(mask)) and positions.shape[1] == new
    if not fits or not bool((positions == expected)[shown].all()):
        raise Lfm2Error(
            "position_ids say otherwise than attention_mask, which alone decides positions in the exported graph. "
            "Leave position_ids out."
        )


def is_empty(cache: Any) -> bool:
    """Whether it is a cache of transformers' own that has seen nothing."""
    if isinstance(cache, Lfm2Cache) or not isinstance(cache, Cache):
        return False
    return not any(getattr(layer, "is_initialized", False) for layer in cache.layers)
