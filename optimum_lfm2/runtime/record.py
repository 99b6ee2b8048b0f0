"""What a cache remembers of its last calls, so that their tokens can be taken back or run again."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from optimum_lfm2.caches import CacheTensor


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


@dataclass
class Record:
    """The calls that a cache records, and the tokens that it has to run again.

    Attributes:
        pending: tokens that count as seen, but have to be run again, int64 (batch_size, count); None for none. They
            follow the columns that keys, values and states hold.
        points: the points since recording began or tokens were taken back, oldest first; None without recording.
        columns: what the last call of the graph added to each state, if the cache records and the graph gives it.
        features: of pictures, (picture tokens, hidden_size), for ids that number them: those of a call, and those of
            calls that are recorded or pending. None without pictures.
    """

    pending: torch.Tensor | None = None
    points: list[Point] | None = None
    columns: States | None = None
    features: torch.Tensor | None = None

    @property
    def recording(self) -> bool:
        """Whether the next call is recorded."""
        return self.points is not None

    @property
    def count(self) -> int:
        """The number of pending tokens of each row."""
        return 0 if self.pending is None else self.pending.shape[1]

    def copied(self) -> Record:
        """Return the record of a copy of the cache. It has the pending tokens, and no points."""
        return Record(self.pending, features=None if self.pending is None else self.features)

    def begin(self) -> None:
        """Record from here on. What was recorded stays."""
        if self.points is None:
            self.points = []

    def end(self) -> None:
        """Record no longer, and forget what was recorded."""
        self.points = self.columns = None

    def forget_points(self) -> None:
        """Forget what was recorded, and go on recording."""
        if self.points is not None:
            self.points = []

    def select(self, rows: torch.Tensor) -> None:
        """Take the pending tokens of these rows, int64 (rows,), and forget the points, which are of the old rows."""
        self.forget_points()
        if self.pending is not None:
            self.pending = self.pending[rows.to(self.pending.device)]

    def add(self, point: Point, all_seen: bool) -> None:
        """Add the point before a call that has ended.

        Args:
            point: the point.
            all_seen: whether no token of the call was masked.
        """
        # Several calls of the graph, as for long prompts and single rows, leave no columns of the whole call. Masked
        # tokens have columns too, but are none of a state's.
        columns, new = self.columns, point.ids.shape[1]
        if columns is not None and all_seen and all(x.shape[2] == new for x in columns.values()):
            point.columns = columns
        self.points = [*(self.points or ()), point]
        if len(self.points) > MOST_POINTS:
            first, second, *others = self.points
            self.points = [first.followed_by(second), *others]

    def point_at(self, length: int) -> Point | None:
        """Return the last point before or at a length, or None if there is none."""
        return next((point for point in reversed(self.points or ()) if point.length <= length), None)

    def take_pending(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the tokens to run, (batch_size, pending + new): the pending ones are no longer so."""
        pending, self.pending = self.pending, None
        return ids if pending is None else torch.cat([pending.to(ids.device), ids], dim=1)

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
        if self.pending is None and self.points is None:
            self.features = None
