"""Checks of the arguments of `forward` and `generate`."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache

from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.runtime.cache import Lfm2Cache


def check_ids(ids: torch.Tensor) -> None:
    """Raise `Lfm2Error` for ids that are not integers (batch_size, sequence_length), or of which there are none."""
    if ids.dim() != 2 or ids.numel() == 0 or ids.is_floating_point():
        raise Lfm2Error(
            f"input_ids has the shape {tuple(ids.shape)} and the type {ids.dtype}; it needs integers "
            "(batch_size, sequence_length), with one row and one token at least."
        )


def check_positions(positions: torch.Tensor | None, mask: torch.Tensor, new: int) -> None:
    """Raise `Lfm2Error` for positions that contradict the mask. Those of masked tokens may be anything.

    Args:
        positions: int64 (batch_size or 1, new), or None.
        mask: (batch_size, cached + new).
        new: the number of new tokens.
    """
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


def check_columns(columns: torch.Tensor | None, total: int, new: int) -> None:
    """Raise `Lfm2Error` for a `cache_position`, int64 (new), that is not the cache's next `new` columns up to `total`.

    Only transformers 4 heeds it.
    """
    if columns is not None and columns.tolist() != list(range(total - new, total)):
        raise Lfm2Error(
            f"cache_position has to be {total - new} to {total - 1}: the exported graph writes new tokens behind the "
            "cached ones. Leave cache_position out."
        )


def check_kept(logits_to_keep: int | torch.Tensor) -> None:
    """Raise `Lfm2Error` for a negative number of logits to keep."""
    if isinstance(logits_to_keep, int) and logits_to_keep < 0:
        raise Lfm2Error(f"logits_to_keep is {logits_to_keep}: give a number of tokens, or 0 for all.")


def one_cache(past_key_values: Any, cache: Any) -> Any:
    """Return the cache, which has two names in transformers. Raise `Lfm2Error` for two different ones."""
    if None not in (past_key_values, cache) and past_key_values is not cache:
        raise Lfm2Error("past_key_values and cache are two names for one argument. Give one of them.")
    return past_key_values if cache is None else cache


def check_cache_type(cache: Any) -> None:
    """Raise `Lfm2Error` for a cache that no call of ours returned. None is allowed."""
    if cache is not None and not isinstance(cache, Lfm2Cache):
        raise Lfm2Error(
            f"The cache is a {type(cache).__name__}; this model continues only the cache that it returned itself, "
            "which holds convolution states too."
        )


def is_empty(cache: Any) -> bool:
    """Return whether this is a cache of transformers itself, and holds no token."""
    if isinstance(cache, Lfm2Cache) or not isinstance(cache, Cache):
        return False
    return not any(getattr(layer, "is_initialized", False) for layer in cache.layers)
