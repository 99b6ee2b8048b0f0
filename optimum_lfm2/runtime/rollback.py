"""Taking tokens back: after a failed call, and by `crop`.

Keys and values only forget their last columns. A state of fixed size must become what it was. So a cache that records
keeps its states before each call. Where the graph gives the columns that a call adds, the state after any of its tokens
is a slice of them. For other graphs the state goes back to that before the call, and the tokens of the call that stay
are run again, in one call with the next ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from optimum_lfm2 import compat
from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.runtime.record import Point, Record, States


class Rollback:
    """The methods of `Lfm2Cache` that take tokens back.

    Attributes:
        record: what the cache remembers of its last calls.
    """

    is_croppable = True
    record: Record
    # Those of `Lfm2Cache`.
    layout: Any
    tensors: dict[str, torch.Tensor]
    spare: dict[str, torch.Tensor]
    length: int
    capacity: int
    alone: Any
    hidden: torch.Tensor | None
    bindings: dict[object, object]

    def activate_past_recording(self) -> None:
        """Record from here on, so that `crop` can take tokens back. transformers 5 calls it for assisted generation."""
        self.record.begin()

    def stop_recording(self) -> None:
        """Record no longer, and forget what was recorded."""
        self.record.end()

    def get_seq_length(self, layer_idx: int | None = 0) -> int:
        """Number of columns seen, padding included, the same for every layer."""
        return self.length + self.record.count

    def crop(self, tokens: int) -> None:
        """Take the last tokens back. What was recorded is forgotten then.

        Args:
            tokens: the number of tokens to take back, as a negative number, or the length to go back to. 0 means what
                the installed transformers means by it: no token to take back (5.24), or the length 0 (4.57).

        Raises:
            Lfm2Error: the cache does not have as many tokens, or has not recorded since.
        """
        seen = self.get_seq_length()
        length = tokens if tokens > 0 or (tokens == 0 and not compat.CROPS_BY_NUMBER) else seen + tokens
        if length < 0:
            raise Lfm2Error(f"crop({tokens}) takes back more tokens than the {seen} that the cache has.")
        if length < seen:
            self._go_back(seen, length)
            self.hidden = None if self.hidden is None else self.hidden[:, :length]
        self.record.forget_points()

    def _go_back(self, seen: int, length: int) -> None:
        if length >= self.length:  # nothing that was run again yet
            self._leave_pending(self.record.pending, length)
            return
        point = self.record.point_at(length)
        if point is None:
            raise Lfm2Error(
                f"A cache of {seen} tokens cannot be cropped to {length}: a state goes back only to what was recorded. "
                "Call activate_past_recording() on the cache before the call whose tokens you take back."
            )
        states = point.states_after(length - point.length, self.layout.states)
        if states is None:
            self._restore_states(point.length, point.states, point.rows)
        else:
            self._restore_states(length, states, point.rows)
        self._leave_pending(point.ids, length)

    def _leave_pending(self, ids: torch.Tensor | None, length: int) -> None:
        count = length - self.length
        self.record.pending = ids[:, :count] if ids is not None and count else None

    def _restore_states(self, length: int, states: States, rows: list[tuple[int, States]] | None) -> None:
        """Write states to the buffers, where bindings find them."""
        self.length = length
        if self.alone is None:
            for name, state in states.items():
                self.tensors[name].copy_(state)
            return
        for i, row in enumerate(self.alone):
            own = rows[i] if rows else (length, {name: state[i : i + 1] for name, state in states.items()})
            row._restore_states(*own, None)

    @contextmanager
    def recorded(self, ids: torch.Tensor, mask: torch.Tensor) -> Iterator[None]:
        """Record the call in the `with` block, if the cache records.

        Args:
            ids: the tokens of the call, int64 (batch_size, new).
            mask: int64 (batch_size, length + new).
        """
        record = self.record
        if record.points is None:
            yield
            return
        if record.points:
            record.points[-1].keep()
        rows = None if self.alone is None else [(row.length, row._states()) for row in self.alone]
        # One token is one call of the graph, which writes new states to the other buffers.
        borrowed = ids.shape[1] == 1 and rows is None
        point = Point(self.length, self._states(copied=not borrowed), rows, ids, borrowed=borrowed)
        record.columns = None
        yield
        record.add(point, all_seen=bool(mask[:, -ids.shape[1] :].all()))

    def _states(self, copied: bool = True) -> States:
        return {name: self.tensors[name].clone() if copied else self.tensors[name] for name in self.spare}

    def unchanged_on_failure(self, several_tokens: bool) -> UnchangedOnFailure:
        """Return a context that restores the cache if the `with` block ends with an exception.

        A call of the graph writes new columns after those in use, and a new state to the state's other buffer. So the
        old values are still there. Several calls overwrite the first buffer again: with `several_tokens`, which may
        take several calls, the states are copied first.
        """
        return UnchangedOnFailure(self, several_tokens)

    def _snapshot(self, several_tokens: bool) -> dict[str, Any]:
        kept = {name: tensor.clone() for name, tensor in self.tensors.items() if name in self.spare and several_tokens}
        alone = None if self.alone is None else [(row, row._snapshot(several_tokens)) for row in self.alone]
        return {
            "tensors": {**self.tensors, **kept},
            "spare": self.spare,
            "length": self.length,
            "capacity": self.capacity,
            "alone": alone,
            "pending": self.record.pending,
        }

    def _restore(self, before: dict[str, Any]) -> None:
        rows, self.record.pending = before["alone"], before["pending"]
        for row, state in rows or ():
            row._restore(state)
        state = {name: value for name, value in before.items() if name != "pending"}
        self.__dict__.update(state, alone=None if rows is None else [row for row, _ in rows])
        # Buffers that a clone replaced are bound no longer.
        self.bindings.clear()


class UnchangedOnFailure:
    """The context of `Rollback.unchanged_on_failure`. Every token enters it, and a generator would add 10 µs to it."""

    def __init__(self, cache: Rollback, several_tokens: bool) -> None:
        self._cache = cache
        self._before = cache._snapshot(several_tokens)

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._cache._restore(self._before)
