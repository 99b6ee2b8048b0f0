"""The gold that a graph is validated against: transformers' own forward, one row at a time, without padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from transformers import PreTrainedModel

from optimum_lfm2 import compat
from optimum_lfm2.families import MEMBERS
from optimum_lfm2.graph.member import LayerKind


Caches = Sequence[tuple[torch.Tensor, ...]]


def fill_visible(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    past: Caches | None,
    output: torch.Tensor,
    present: Caches,
) -> None:
    """Write what transformers computes over every value of `output` and `present` that belongs to an unmasked token.

    Values at masked tokens are nobody's business: they stay as they are.

    Args:
        input_ids: int64 (batch_size, sequence_length).
        attention_mask: int64 (batch_size, past_sequence_length + sequence_length).
        past: one tuple of caches a layer, or None.
        output: logits or hidden states of all new tokens, (batch_size, sequence_length, width).
        present: one tuple of caches a layer.
    """
    past_length = attention_mask.shape[1] - input_ids.shape[1]
    kinds = MEMBERS[model.config.model_type].kinds(model.config)
    for row, seen, new in visible_rows(attention_mask, past_length):
        caches = None if past is None else row_of(past, kinds, row, seen)
        outputs, caches = _run_row(model, input_ids[row, new], caches, len(seen))
        output[row, new] = outputs
        fill_caches(present, caches, kinds, row, past_length + new)


def visible_rows(mask: torch.Tensor, past_length: int) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Each row that has a new token to see: its index, the cached columns that it sees, and which new tokens."""
    for row in range(len(mask)):
        visible = mask[row].nonzero()[:, 0]
        seen, new = visible[visible < past_length], visible[visible >= past_length] - past_length
        if len(new):
            yield row, seen, new


def fill_caches(present: Caches, own: Caches, kinds: Sequence[LayerKind], row: int, columns: torch.Tensor) -> None:
    """Write a row's own caches over `present`, as the kinds of the layers say."""
    for kind, mine, whole in zip(kinds, own, present, strict=True):
        for x, target in zip(mine, whole, strict=True):
            kind.fill(x, target, row, columns)


def row_of(past: Caches, kinds: Sequence[LayerKind], row: int, seen: torch.Tensor) -> Caches:
    """The row's caches as transformers has them, without the columns that it does not see."""
    return [tuple(kind.take(x, row, seen) for x in caches) for kind, caches in zip(kinds, past, strict=True)]


def _run_row(
    model: PreTrainedModel, ids: torch.Tensor, caches: Caches | None, length: int
) -> tuple[torch.Tensor, Caches]:
    """Feed `ids` to transformers: at once on an empty cache, token by token on a full one, as generation does."""
    cache = compat.hybrid_cache(model, caches if length else None)
    pieces = ids.split(1) if length else (ids,)
    outputs = []
    for piece in pieces:
        outputs.append(compat.call(model, piece[None], cache, length)[0])
        length += len(piece)
    return torch.cat(outputs), compat.hybrid_cache_layers(cache)
