"""Bring any rows into the form that a call of the graph takes: contiguous new tokens, in chunks, or row by row."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from optimum.utils import logging

from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.runtime.cache import Lfm2Cache
from optimum_lfm2.runtime.session import GraphSession


PREFILL_CHUNK = 512
# A cache that records runs the last tokens of a call, whose logits are asked for, apart from more tokens than these.
# So taking the last ones back does not mean to run a whole prompt again, or ever more tokens where candidates fail.
RUN_AGAIN = 8

logger = logging.get_logger(__name__)


class RowRunner:
    """Runs rows with any mask. Each row gets the logits that it gets alone."""

    _chunk: int | None = None  # None for `PREFILL_CHUNK`

    def __init__(self, graph: GraphSession, any_padding: bool) -> None:
        self._graph = graph
        self._any_padding = any_padding
        self._told = False

    def in_chunks(self, size: int) -> RowRunner:
        """Return a runner whose calls of the graph take at most so many tokens, and no more than `PREFILL_CHUNK`."""
        twin = copy.copy(self)
        twin._chunk = min(size, PREFILL_CHUNK)
        return twin

    def run(
        self, ids: torch.Tensor, mask: torch.Tensor, cache: Lfm2Cache | None, keep: int, io_binding: bool
    ) -> torch.Tensor:
        """Take what `GraphSession.run` takes, and return what it returns. A failed call leaves the cache as it was."""
        if cache is None:
            return self._run(ids, mask, None, keep, io_binding)
        self._graph.check_cache(cache)
        new, pending = ids.shape[1], cache.record.pending is not None
        keep = min(keep or new, new) if pending else keep
        with cache.unchanged_on_failure(several_tokens=pending or new > 1):
            ids = cache.record.take_pending(ids)
            before = ids.shape[1] - keep if cache.record.recording and keep > 1 else 0
            if before > RUN_AGAIN:
                self._run_recorded(ids[:, :before], mask[:, : before - ids.shape[1]], cache, 1, io_binding)
                ids = ids[:, before:]
            return self._run_recorded(ids, mask, cache, keep, io_binding)

    def _run_recorded(
        self, ids: torch.Tensor, mask: torch.Tensor, cache: Lfm2Cache, keep: int, io_binding: bool
    ) -> torch.Tensor:
        if not cache.record.recording:
            return self._run(ids, mask, cache, keep, io_binding)
        with cache.recorded(ids, mask):
            return self._run(ids, mask, cache, keep, io_binding)

    def run_to_last(
        self, ids: torch.Tensor, mask: torch.Tensor, cache: Lfm2Cache | None, io_binding: bool
    ) -> torch.Tensor:
        """Run as `run` does, and return the logits of each row's last unmasked token, (batch_size, 1, vocab_size).

        Raises:
            Lfm2Error: a row has no unmasked token among the new ones.
        """
        visible = (mask[:, -ids.shape[1] :] != 0).to(torch.int64)
        if not bool(visible.any(1).all()):
            row = int(visible.any(1).to(torch.int64).argmin())
            raise Lfm2Error(f"attention_mask hides every new token of row {row}. Leave the row out of the batch.")
        if cache is None:
            return self._run_padding_first(ids, mask, visible, None, io_binding)
        self._graph.check_cache(cache)
        with cache.unchanged_on_failure(several_tokens=True):
            ids = cache.record.take_pending(ids)
            visible = (mask[:, cache.length :] != 0).to(torch.int64)
            with cache.recorded(ids, mask):
                return self._run_to_last(ids, mask, visible, cache, io_binding)

    def _run_to_last(
        self, ids: torch.Tensor, mask: torch.Tensor, visible: torch.Tensor, cache: Lfm2Cache, io_binding: bool
    ) -> torch.Tensor:
        if not self._any_padding:
            logits = self._run(ids, mask, cache, 0, io_binding)
            last = ids.shape[1] - 1 - visible.flip(1).argmax(1)
            return logits[torch.arange(len(ids)), last.to(logits.device)][:, None]
        if cache.length == 0:
            return self._run_padding_first(ids, mask, visible, cache, io_binding)
        # On a full cache no padding may precede the tokens: each row runs its own, and skips what is hidden.
        counts = visible.sum(1).tolist()
        order = visible.argsort(dim=1, stable=True, descending=True)
        return _in_order(
            order, ids, mask, cache, lambda ids, mask: self._run_first(ids, mask, counts, cache, io_binding)
        )

    def _run_padding_first(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor,
        visible: torch.Tensor,
        cache: Lfm2Cache | None,
        io_binding: bool,
    ) -> torch.Tensor:
        """On an empty cache padding may precede the tokens, so that all rows end in the same column."""
        order = visible.argsort(dim=1, stable=True)
        return _in_order(order, ids, mask, cache, lambda ids, mask: self._run(ids, mask, cache, 1, io_binding))

    def _run_first(
        self, ids: torch.Tensor, mask: torch.Tensor, counts: list[int], cache: Lfm2Cache, io_binding: bool
    ) -> torch.Tensor:
        """Run the first tokens of each row, as many as `counts` says, and return the last one's logits."""
        past, new = cache.length, ids.shape[1]
        cache.reserve(past + new)  # so that the rows stay views of one buffer
        rows, logits = cache.split(), []
        for i, (row, count) in enumerate(zip(rows, counts, strict=True)):
            own = ids[i : i + 1, :count], mask[i : i + 1, : past + count]
            logits.append(self._run_in_chunks(*own, row, 1, io_binding))
            row.skip(new - count)
        cache.join(rows)
        return torch.cat(logits)

    def _run(
        self, ids: torch.Tensor, mask: torch.Tensor, cache: Lfm2Cache | None, keep: int, io_binding: bool
    ) -> torch.Tensor:
        if not self._any_padding and (bool((mask == 0).any()) or (cache is not None and cache.alone is not None)):
            return self._run_alone(ids, mask, cache, keep, io_binding)
        order = contiguous_order(mask, 0 if cache is None else cache.length)
        if order is None:
            return self._run_contiguous(ids, mask, cache, keep, io_binding)
        logits = _in_order(
            order, ids, mask, cache, lambda ids, mask: self._run_contiguous(ids, mask, cache, 0, io_binding)
        )
        back = order.argsort(dim=1).to(logits.device)
        return logits.gather(1, back[:, :, None].expand_as(logits))[:, -keep:]

    def _run_contiguous(
        self, ids: torch.Tensor, mask: torch.Tensor, cache: Lfm2Cache | None, keep: int, io_binding: bool
    ) -> torch.Tensor:
        batch, sequence = ids.shape
        one_call = cache is None or (cache.length == 0 and sequence <= (self._chunk or PREFILL_CHUNK))
        if cache is None or batch == 1 or sequence == 1 or one_call:
            return self._run_in_chunks(ids, mask, cache, keep, io_binding)
        # GroupQueryAttention takes several rows with several new tokens on an empty cache only.
        cache.reserve(cache.length + sequence)  # so that the rows stay views of one buffer
        rows = cache.split()
        logits = [
            self._run_in_chunks(ids[i : i + 1], mask[i : i + 1], row, keep, io_binding) for i, row in enumerate(rows)
        ]
        cache.join(rows)
        return torch.cat(logits)

    def _run_in_chunks(
        self, ids: torch.Tensor, mask: torch.Tensor, cache: Lfm2Cache | None, keep: int, io_binding: bool
    ) -> torch.Tensor:
        sequence, size = ids.shape[1], self._chunk or PREFILL_CHUNK
        if cache is None or sequence <= size:
            return self._graph.run(ids, mask, cache, keep, io_binding)
        past = cache.length
        first_kept = sequence - (min(keep, sequence) or sequence)
        logits = []
        for start in range(0, sequence, size):
            end = min(start + size, sequence)
            kept = end - max(start, first_kept)
            chunk = self._graph.run(ids[:, start:end], mask[:, : past + end], cache, max(kept, 1), io_binding)
            if kept > 0:
                logits.append(chunk)
        return torch.cat(logits, dim=1)

    def _run_alone(
        self, ids: torch.Tensor, mask: torch.Tensor, cache: Lfm2Cache | None, keep: int, io_binding: bool
    ) -> torch.Tensor:
        """Run each row by itself, without its masked tokens, for another exporter's graph that is wrong on padding."""
        if not self._told:
            logger.info("This graph is wrong on padded rows: they run one by one, without their padding.")
            self._told = True
        batch, sequence = ids.shape
        past = 0 if cache is None else cache.length
        own = None if cache is None else cache.separate()
        first_kept = sequence - (min(keep, sequence) or sequence)
        logits: torch.Tensor | None = None
        for i in range(batch):
            row_cache = None if own is None else own[i]
            if cache is not None and row_cache is not None:
                row_cache.record.features = cache.record.features
            if row_cache is not None and int((mask[i, :past] != 0).sum()) != row_cache.length:
                raise Lfm2Error(
                    "attention_mask hides cached tokens that it showed before: this graph cannot forget them."
                )
            visible = mask[i, past:].nonzero()[:, 0]
            if len(visible) == 0:
                continue
            kept = visible[visible >= first_kept]
            row = self._run_in_chunks(
                ids[i : i + 1, visible],
                mask.new_ones(1, len(visible) + (0 if row_cache is None else row_cache.length)),
                row_cache,
                max(len(kept), 1),
                io_binding,
            )
            if logits is None:
                logits = row.new_zeros(batch, sequence - first_kept, row.shape[2])
            if len(kept):
                logits[i, kept - first_kept] = row[0, -len(kept) :]
        if logits is None:
            raise Lfm2Error("attention_mask hides every token.")
        if cache is not None:
            cache.length = past + sequence
        return logits


def _in_order(
    order: torch.Tensor,
    ids: torch.Tensor,
    mask: torch.Tensor,
    cache: Lfm2Cache | None,
    run: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Run new tokens in another order, (batch_size, new), and put the cache's columns back. Return what `run` returns.

    Args:
        run: takes ids (batch_size, new) and a mask (batch_size, cached + new), and fills the cache.
    """
    past = 0 if cache is None else cache.length
    logits = run(ids.gather(1, order), torch.cat([mask[:, :past], mask[:, past:].gather(1, order)], dim=1))
    if cache is not None:
        cache.reorder_new_columns(past, order.argsort(dim=1))
    return logits


def contiguous_order(mask: torch.Tensor, past: int) -> torch.Tensor | None:
    """Return an order of the new tokens, (batch_size, new), that makes each row's unmasked ones contiguous.

    Return None if they are contiguous already. Padding may precede them on an empty cache, but not on a filled one.
    """
    if mask.shape[1] == past + 1:
        return None
    new = mask[:, past:]
    if bool(new.all()):
        return None
    hidden = (new == 0).to(torch.int64)
    starts = (hidden.diff(dim=1) == -1).sum(1)  # steps from hidden to visible
    allowed = hidden[:, 0] if past == 0 else 0
    return None if bool((starts <= allowed).all()) else hidden.argsort(dim=1, stable=True)
