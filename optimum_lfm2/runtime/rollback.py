"""Taking tokens back: after a failed call, and by `crop`.

Keys and values only forget their last columns. A state of fixed size must become what it was. So a cache that records
keeps its states before each call. Where the graph gives the columns that a call adds, the state after any of its tokens
is a slice of them. For other graphs the state goes back to that before the call, and the tokens of the call that stay
are run again, in one call with the next ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from optimum_lfm2 import compat
from optimum_lfm2.caches import CacheTensor
from optimum_lfm2.errors import Lfm2Error


MOST_POINTS = 32  # more calls than that are joined, so that memory does not grow with each call

States = dict[str, torch.Tensor]


@dataclass
class Point:
    """A cache before a call, and what the call added.

    Attributes:
        length: the number of columns.
        states: the states, by the names of their inputs: copies, or the cache's spare buffers while `borrowed`.
        rows: of each row its length and its states, where rows have caches of their own; else None.
        ids: the tokens of the call, int64 (batch_size, new).
        columns: the columns that the call added to each state, (batch_size, ..., new, ...); None if they are not known.
        borrowed: whether the next call of the graph will overwrite `states`. Most points are forgotten before it.
    """

    length: int
    states: States
    rows: list[tuple[int, States]] | None
    ids: torch.Tensor
    columns: States | None = None
    borrowed: bool = False

    def keep(self) -> None:
        """Copy what the next call of the graph will overwrite."""
        if self.borrowed:
            self.states, self.borrowed = {name: state.clone() for name, state in self.states.items()}, False

    def states_after(self, count: int, caches: Iterable[CacheTensor]) -> States | None:
        """Return the states after the first `count` tokens of the call, or None if its columns are not known."""
        if self.columns is None:
            return None
        return {
            cache.past: cache.state.after(self.states[cache.past], self.columns[cache.past], count) for cache in caches
        }

    def followed_by(self, later: Point) -> Point:
        """Return the point before both calls, as if they were one call."""
        columns = None
        if self.columns is not None and later.columns is not None:
            columns = {name: torch.cat([x, later.columns[name]], dim=2) for name, x in self.columns.items()}
        return Point(self.length, self.states, self.rows, torch.cat([self.ids, later.ids], dim=1), columns)


class Rollback:
    """The methods of `Lfm2Cache` that take tokens back.

    Attributes:
        pending: tokens that count as seen, but have to be run again, int64 (batch_size, count); None for none. They
            follow the `length` columns that keys, values and states hold.
        recording: the points since recording began or tokens were taken back, oldest first; None without recording.
        columns: what the last call of the graph added to each state, if the cache records and the graph gives it.
        features: of pictures, (picture tokens, hidden_size), for ids that number them: those of a call, and those of
            calls that are recorded or pending. None without pictures.
    """

    is_croppable = True
    pending: torch.Tensor | None
    recording: list[Point] | None
    columns: States | None
    features: torch.Tensor | None
    # Those of `Lfm2Cache`.
    layout: Any
    tensors: dict[str, torch.Tensor]
    spare: dict[str, torch.Tensor]
    length: int
    capacity: int
    alone: Any
    bindings: dict[object, object]

    def activate_past_recording(self) -> None:
        """Record from here on, so that `crop` can take tokens back. transformers 5 calls it for assisted generation."""
        if self.recording is None:
            self.recording = []

    def stop_recording(self) -> None:
        """Record no longer, and forget what was recorded."""
        self.recording = self.columns = None

    def number_pictures(self, ids: torch.Tensor, features: torch.Tensor, first: int) -> torch.Tensor:
        """Take the features of a call, and return its ids so that they number them here.

        Args:
            ids: int64 (batch_size, new). The id `first` + i stands for the row i of `features`.
            features: (picture tokens, hidden_size).
        """
        self.forget_pictures()
        earlier = self.features
        self.features = features if earlier is None else torch.cat([earlier, features])
        return ids if earlier is None else ids + (ids >= first) * len(earlier)

    def forget_pictures(self) -> None:
        """Forget the features of earlier calls, unless tokens of these may be run again."""
        if self.pending is None and self.recording is None:
            self.features = None

    def get_seq_length(self, layer_idx: int | None = 0) -> int:
        """Number of columns seen, padding included, the same for every layer."""
        return self.length + (0 if self.pending is None else self.pending.shape[1])

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
        if self.recording is not None:
            self.recording = []

    def _go_back(self, seen: int, length: int) -> None:
        if length >= self.length:  # nothing that was run again yet
            self._leave_pending(self.pending, length)
            return
        points = [point for point in self.recording or () if point.length <= length]
        if not points:
            raise Lfm2Error(
                f"A cache of {seen} tokens cannot be cropped to {length}: a state goes back only to what was recorded. "
                "Call activate_past_recording() on the cache before the call whose tokens you take back."
            )
        point = points[-1]
        states = point.states_after(length - point.length, self.layout.states)
        if states is None:
            self._restore_states(point.length, point.states, point.rows)
        else:
            self._restore_states(length, states, point.rows)
        self._leave_pending(point.ids, length)

    def _leave_pending(self, ids: torch.Tensor, length: int) -> None:
        count = length - self.length
        self.pending = ids[:, :count] if count else None

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
        if self.recording is None:
            yield
            return
        if self.recording:
            self.recording[-1].keep()
        rows = None if self.alone is None else [(row.length, row._states()) for row in self.alone]
        # One token is one call of the graph, which writes new states to the other buffers.
        borrowed = ids.shape[1] == 1 and rows is None
        point = Point(self.length, self._states(copied=not borrowed), rows, ids, borrowed=borrowed)
        self.columns = None
        yield
        # Several calls of the graph, as for long prompts and single rows, leave no columns of the whole call. Masked
        # tokens have columns too, but are none of a state's.
        columns, new = self.columns, ids.shape[1]
        if columns is not None and all(x.shape[2] == new for x in columns.values()) and bool(mask[:, -new:].all()):
            point.columns = columns
        self.recording.append(point)
        if len(self.recording) > MOST_POINTS:
            first, second, *others = self.recording
            self.recording = [first.followed_by(second), *others]

    def _states(self, copied: bool = True) -> States:
        return {name: self.tensors[name].clone() if copied else self.tensors[name] for name in self.spare}

    def take_pending(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the tokens to run, (batch_size, pending + new): the pending ones are no longer so."""
        pending, self.pending = self.pending, None
        return ids if pending is None else torch.cat([pending.to(ids.device), ids], dim=1)

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
            "pending": self.pending,
        }

    def _restore(self, before: dict[str, Any]) -> None:
        rows = before["alone"]
        for row, state in rows or ():
            row._restore(state)
        self.__dict__.update(before, alone=None if rows is None else [row for row, _ in rows])
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
