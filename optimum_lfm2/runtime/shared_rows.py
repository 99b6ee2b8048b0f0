"""The caches of rows that run together, each with a length of its own.

A call of the graph gives every row one token, in one new column. So rows lie side by side with their last tokens in the
same column, and `attention_mask` hides what is left of a row's first one. Keys carry their rotation and the mask alone
decides positions, so a row may be put anywhere: it joins at the right end, and moves when the columns left of all rows
are worth it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from optimum_lfm2.caches import GROWS
from optimum_lfm2.runtime.cache import Lfm2Cache
from optimum_lfm2.runtime.layout import GraphLayout


BLOCK = 64  # capacities are multiples of it
LEAST_WASTE = 64  # columns that no row uses; fewer are not worth a move
_NUMPY = {torch.float32: np.float32, torch.float16: np.float16, torch.int8: np.int8}


class SharedRows(Lfm2Cache):
    """A cache whose rows come and go. `GraphSession.run` takes it for one token a row.

    Attributes:
        counts: how many tokens each row holds.
        mask: int64 (most rows, capacity): 1 on the columns of a row's tokens.
    """

    def __init__(self, layout: GraphLayout, device: torch.device, most: int) -> None:
        super().__init__(layout, 0, device, 0)
        self.most = most
        self.counts: list[int] = []
        self._release()

    def _release(self) -> None:
        """Give the memory back."""
        self.length = 0
        self._allocate(0)

    def _allocate(self, capacity: int) -> None:
        """Make empty buffers for `most` rows. Memory that no row has used costs nothing."""
        self._full, self._other = {}, {}
        for cache in self.layout.caches:
            shape = [self.most, *(capacity if size is GROWS else size for size in self.layout.shapes[cache.past])]
            self._full[cache.past] = self._zeros(shape, self.layout.dtypes[cache.past])
            if not cache.grows:
                self._other[cache.past] = torch.empty_like(self._full[cache.past])
        # numpy sees the same memory: right after a call of the graph its operations take a part of the time of torch's.
        self._marks = np.zeros((self.most, capacity), dtype=np.int64)
        self.mask = torch.from_numpy(self._marks)
        self.capacity = capacity
        self._show(len(self.counts))

    def _zeros(self, shape: list[int], dtype: torch.dtype) -> torch.Tensor:
        if self.device.type != "cpu":
            return torch.zeros(shape, dtype=dtype, device=self.device)
        # torch touches the memory of its zeros at once, numpy when they are written. A masked column must be finite.
        return torch.from_numpy(np.zeros(shape, dtype=_NUMPY[dtype]))

    def _show(self, rows: int) -> None:
        """Let a session see the first rows alone."""
        self.batch_size = rows
        self.tensors = {name: tensor[:rows] for name, tensor in self._full.items()}
        self.spare = {name: tensor[:rows] for name, tensor in self._other.items()}
        self.bindings.clear()

    def swap(self) -> None:
        """Exchange the two buffers of each state after a call."""
        super().swap()
        self._full, self._other = {**self._full, **self._other}, {name: self._full[name] for name in self._other}

    def reserve(self, length: int, exact: bool = False) -> None:
        """Make room for `length` columns."""
        if length > self.capacity:
            self.fit(length)

    def fit(self, columns: int) -> None:
        """Move the rows to buffers of so many columns, or a few more."""
        full, mask, rows = self._full, self.mask, len(self.counts)
        self._allocate(-(-max(columns, self.length) // BLOCK) * BLOCK)
        for name, old in full.items():
            if name in self._other:
                self._full[name].copy_(old)
            else:
                self._full[name][:rows, :, : self.length] = old[:rows, :, : self.length]
        self.mask[:rows, : self.length] = mask[:rows, : self.length]

    def enter(self, row: Lfm2Cache, columns: int) -> None:
        """Add a row, as the last one.

        Args:
            row: a cache of one row without padding. It is copied.
            columns: how many columns the rows will need at most, this one included.
        """
        slot, count = len(self.counts), row.length
        if columns > self.capacity:
            self.fit(columns)
        if count > self.length:
            self._move(count)
        start = self.length - count
        for name in self._growing():
            self._full[name][slot, :, :start] = 0  # of another row, which may have been broken
            self._full[name][slot, :, start : self.length] = row.tensors[name][0, :, :count]
        for name in self._other:
            self._full[name][slot] = row.tensors[name][0]
        self.mask[slot, :start], self.mask[slot, start : self.length] = 0, 1
        self.counts.append(count)
        self._show(slot + 1)

    def leave(self, index: int) -> None:
        """Remove a row. The last one takes its place."""
        last = len(self.counts) - 1
        if index != last:
            for name, tensor in self._full.items():
                used = tensor if name in self._other else tensor[:, :, : self.length]
                used[index] = used[last]
            self.mask[index, : self.length] = self.mask[last, : self.length]
            self.counts[index] = self.counts[last]
        del self.counts[last]
        if not self.counts:
            self._release()
            return
        self._show(last)
        unused = self.length - max(self.counts)
        if unused >= max(LEAST_WASTE, self.length // 4):
            self.compact()

    def compact(self) -> None:
        """Move all rows to the left, as far as the longest goes."""
        self._move(max(self.counts))

    def _move(self, length: int) -> None:
        """Let the rows end in the column `length`. No row has more tokens than that."""
        rows, by = len(self.counts), length - self.length
        if length > self.capacity:
            self.fit(length)

        def moved(used: torch.Tensor, along: Callable[[torch.Tensor, int, int], torch.Tensor]) -> None:
            kept = along(used, max(-by, 0), self.length).clone()
            along(used, max(by, 0), length).copy_(kept)
            along(used, 0, max(by, 0)).zero_()

        for name in self._growing():
            moved(self._full[name][:rows], lambda used, start, end: used[:, :, start:end])
        moved(self.mask[:rows], lambda used, start, end: used[:, start:end])
        self.length = length

    def row(self, index: int) -> Lfm2Cache:
        """Return a row as a cache that shares its memory, to run it alone in the same columns."""
        return self._twin(
            batch_size=1,
            tensors={name: tensor[index : index + 1] for name, tensor in self.tensors.items()},
            spare={name: tensor[index : index + 1] for name, tensor in self.spare.items()},
        )

    def new_mask(self) -> torch.Tensor:
        """Return the mask of a call that gives each row one token: int64 (rows, length + 1)."""
        rows = len(self.counts)
        self.reserve(self.length + 1)
        self._marks[:rows, self.length] = 1
        return torch.from_numpy(np.ascontiguousarray(self._marks[:rows, : self.length + 1]))

    def count_tokens(self) -> None:
        """Note that each row has a token more."""
        self.counts = [count + 1 for count in self.counts]

    def copy_of(self, index: int) -> dict[str, torch.Tensor]:
        """Return what a row holds, in memory of its own: keys and values of its tokens alone, and states."""
        start = self.length - self.counts[index]
        return {
            name: (tensor if name in self._other else tensor[:, :, start : self.length])[index : index + 1].clone()
            for name, tensor in self._full.items()
        }
