"""Checks of the arguments of `forward` and `generate`."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from typing import Any

import torch
from transformers.cache_utils import Cache

from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.runtime.cache import Lfm2Cache


DEVICES = ("cpu", "cuda")  # those that Optimum knows a provider for
PAGED = (
    'Continuous batching (generate_batch, cache_implementation="paged") cannot be honoured: it replaces a model\'s '
    "attention, and the exported graph has its own. Call generate with padded rows."
)


def by_name(function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call by their names. Raise `TypeError` for what the function does not take."""
    bound = signature(function).bind(*args, **kwargs).arguments
    return {**bound, **bound.pop("kwargs", {})}


def check_ids(ids: Any) -> None:
    """Raise `Lfm2Error` for ids that are not integers (batch_size, sequence_length), or of which there are none."""
    if isinstance(ids, Mapping):
        raise Lfm2Error(
            f"input_ids is a {type(ids).__name__}, which holds input_ids and more. Unpack it: generate(**inputs)."
        )
    _check_tensor("input_ids", ids)
    numbers = not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
    if ids.dim() != 2 or ids.numel() == 0 or not numbers:
        raise Lfm2Error(
            f"input_ids has the shape {tuple(ids.shape)} and the type {ids.dtype}; it needs integers "
            "(batch_size, sequence_length), with one row and one token at least."
        )


def check_mask(mask: Any, name: str = "attention_mask") -> None:
    """Raise `Lfm2Error` for a mask that is no tensor (batch_size, length) of numbers. None is allowed."""
    if mask is None:
        return
    _check_tensor(name, mask)
    if mask.dim() != 2 or mask.is_complex():
        raise Lfm2Error(
            f"{name} has the shape {tuple(mask.shape)} and the type {mask.dtype}; it needs numbers (batch_size, "
            "length), one for each token."
        )


def _check_tensor(name: str, value: Any) -> None:
    if not isinstance(value, torch.Tensor):
        raise Lfm2Error(
            f"{name} is a {type(value).__name__}, and has to be a tensor of torch. Tokenizers give one for "
            'return_tensors="pt".'
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


def check_kept(logits_to_keep: Any, new: int) -> int | torch.Tensor:
    """Return which logits are kept: those of the last so many tokens (0: all), or of the tokens at these indices.

    Raises:
        Lfm2Error: it is neither a number from 0 on, nor integers (kept) that point into `new` tokens.
    """
    if isinstance(logits_to_keep, torch.Tensor) and logits_to_keep.dim() > 0:
        index = logits_to_keep
        whole = not (index.is_floating_point() or index.is_complex() or index.dtype == torch.bool)
        if index.dim() == 1 and whole and bool(((index >= -new) & (index < new)).all()):
            return index
        raise Lfm2Error(f"logits_to_keep has to point to tokens from 0 to {new - 1}: give integers of one axis.")
    try:
        count = operator.index(logits_to_keep)
    except TypeError:
        count = -1
    if count < 0:
        raise Lfm2Error(f"logits_to_keep is {logits_to_keep}: give a number of tokens, or 0 for all.")
    return count


def check_settings(kwargs: dict[str, Any]) -> None:
    """Raise `Lfm2Error` for arguments of `generate` that no exported graph can honour."""
    if kwargs.get("cache_implementation") == "paged":
        raise Lfm2Error(PAGED)
    if isinstance(kwargs.get("logits_to_keep"), torch.Tensor):
        raise Lfm2Error("logits_to_keep is no argument of generate, which needs the last logits. Leave it out.")
    negative = kwargs.get("negative_prompt_attention_mask")
    check_mask(negative, "negative_prompt_attention_mask")
    if negative is not None and not bool(negative[:, -1].all()):
        raise Lfm2Error("negative_prompt_ids end in padding. Pad them on the left.")


def check_target(args: Sequence[Any], kwargs: dict[str, Any], dtype: torch.dtype) -> None:
    """Raise `Lfm2Error` for a device or a dtype that no exported model can be moved to.

    Args:
        args, kwargs: those of `to`.
        dtype: the model's own.
    """
    given = [*args, *kwargs.values()]
    for value in given:
        if isinstance(value, torch.dtype) and value != dtype:
            raise Lfm2Error(
                f"An exported model keeps its dtype ({dtype}): {value} is chosen by the export, or by file_name."
            )
        if isinstance(value, (str, torch.device)) and str(value).split(":")[0] not in DEVICES:
            raise Lfm2Error(f"ONNX Runtime runs no model on {value}. Give cpu or cuda.")


def check_dtype(asked: torch.dtype | str | None, dtype: torch.dtype) -> None:
    """Raise `Lfm2Error` for another dtype than the model's own, as `from_pretrained` takes it. "auto" is any."""
    check_target([getattr(torch, asked, None) if isinstance(asked, str) else asked], {}, dtype)


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
