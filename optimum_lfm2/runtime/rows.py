"""Any rows, brought into the form that one call takes: the new tokens contiguous, in chunks, one row at a time if need be."""

from __future__ import annotations

import torch

from optimum_lfm2.runtime.cache import Lfm2Cache
from optimum_lfm2.runtime.session import GraphSession


PREFILL_CHUNK = 512


class RowRunner:
    """`GraphSession.run` without its limits: each row gets what it gets alone."""

    def __init__(self, graph: GraphSession) -> None:
        self._graph = graph

    def run(
        self, ids: torch.Tensor, mask: torch.Tensor, cache: Lfm2Cache | None, keep: int, io_binding: bool
    ) -> torch.Tensor:
        """Arguments and result as of `GraphSession.run`."""
        order = None if cache is None else contiguous_order(mask, cache.length)
        if order is None:
            return self._run_contiguous(ids, mask, cache, keep, io_binding)
        past = cache.length
        mask = torch.cat([mask[:, :past], mask[:, past:].gather(1, order)], dim=1)
        logits = self._run_contiguous(ids.gather(1, order), mask, cache, 0, io_binding)
        back = order.argsort(dim=1)
        cache.reorder_new_columns(past, back)
        logits = logits.gather(1, back.to(logits.device)[:, :, None].expand_as(logits))
        return logits[:, -keep:]

    def _run_contiguous(
        self, ids: torch.Tensor, mask: torch.Tensor, cache: Lfm2Cache | None, keep: int, io_binding: bool
    ) -> torch.Tensor:
        batch, sequence = ids.shape
        several_calls = cache is not None and (cache.length > 0 or sequence > PREFILL_CHUNK)
        if batch == 1 or sequence == 1 or not several_calls:
            return self._run_in_chunks(ids, mask, cache, keep, io_binding)
        # GroupQueryAttention takes several rows with several new tokens on an empty cache only.
        rows = cache.split()
        logits = [
            self._run_in_chunks(ids[i : i + 1], mask[i : i + 1], row, keep, io_binding) for i, row in enumerate(rows)
        ]
        cache.join(rows)
        return torch.cat(logits)

    def _run_in_chunks(
        self, ids: torch.Tensor, mask: torch.Tensor, cache: Lfm2Cache | None, keep: int, io_binding: bool
    ) -> torch.Tensor:
        sequence = ids.shape[1]
        if cache is None or sequence <= PREFILL_CHUNK:
            return self._graph.run(ids, mask, cache, keep, io_binding)
        past = cache.length
        first_kept = sequence - (min(keep, sequence) or sequence)
        if io_binding:
            cache.reserve(past + sequence)
        logits = []
        for start in range(0, sequence, PREFILL_CHUNK):
            end = min(start + PREFILL_CHUNK, sequence)
            kept = end - max(start, first_kept)
            chunk = self._graph.run(ids[:, start:end], mask[:, : past + end], cache, max(kept, 1), io_binding)
            if kept > 0:
                logits.append(chunk)
        return torch.cat(logits, dim=1)


def contiguous_order(mask: torch.Tensor, past: int) -> torch.Tensor | None:
    """The order of new tokens in which each row's unmasked ones are contiguous, (batch_size, new); None where they are.

    Before them there may be padding on an empty cache; on a full one they must come first.
    """
    new = mask[:, past:]
    if new.shape[1] == 1 or bool(new.all()):
        return None
    hidden = (new == 0).to(torch.int64)
    starts = (hidden.diff(dim=1) == -1).sum(1)  # steps from hidden to visible
    allowed = hidden[:, 0] if past == 0 else 0
    return None if bool((starts <= allowed).all()) else hidden.argsort(dim=1, stable=True)
