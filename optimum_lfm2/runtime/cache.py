"""The cache of a generation: keys and values that grow, states that do not."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch

from optimum_lfm2.caches import GROWS
from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.runtime.layout import GraphLayout


MIN_CAPACITY = 64


class Lfm2Cache:
    """One object for both kinds of cache, which `forward` and `generate` take and give.

    Keys and values lie in buffers (batch_size, kv_heads, capacity, head_dim) of which the first `get_seq_length()`
    columns count; capacity doubles when it is used up. States have a fixed shape: those of convolutions, and the
    windows of sliding attention. There are two of each, past and present in turn. `forward` changes the cache it is
    given: to continue twice from one point, copy it (`copy.deepcopy`).
    """

    is_compileable = False
    is_linear = (False,)  # not all layers: so `generate` asks how many columns were seen

    def __init__(self, layout: GraphLayout, batch_size: int, device: torch.device, capacity: int = 0) -> None:
        self.layout = layout
        self.batch_size = batch_size
        self.device = device
        self.length = 0
        self.capacity = capacity
        self.tensors: dict[str, torch.Tensor] = {}
        self.spare: dict[str, torch.Tensor] = {}
        for cache in layout.caches:
            shape = (batch_size, *(capacity if size is GROWS else size for size in layout.shapes[cache.past]))
            # Zeros, not garbage: a masked column is still multiplied, and NaN * 0 is NaN.
            self.tensors[cache.past] = torch.zeros(shape, dtype=layout.dtypes[cache.past], device=device)
            if not cache.grows:
                self.spare[cache.past] = torch.empty_like(self.tensors[cache.past])
        # One cache a row instead, without the row's masked tokens, for graphs that are wrong on them.
        self.alone: list[Lfm2Cache] | None = None
        # Whatever was prepared for these very buffers: dropped when they are replaced.
        self.bindings: dict[object, object] = {}

    def get_seq_length(self, layer_idx: int | None = 0) -> int:
        """Number of columns seen, padding included, the same for every layer."""
        return self.length

    def get_max_cache_shape(self, layer_idx: int | None = 0) -> int:
        """-1: it grows as it must."""
        return -1

    def reserve(self, length: int) -> None:
        """Make room for `length` columns."""
        if length <= self.capacity:
            return
        self.capacity = max(length, 2 * self.capacity, MIN_CAPACITY)
        for name in self._growing():
            old = self.tensors[name]
            grown = old.new_zeros((*old.shape[:2], self.capacity, old.shape[3]))
            grown[:, :, : self.length] = old[:, :, : self.length]
            self.tensors[name] = grown
        self.bindings.clear()

    def swap(self) -> None:
        """What was written beside the states becomes the states."""
        self.tensors, self.spare = {**self.tensors, **self.spare}, {name: self.tensors[name] for name in self.spare}

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row i becomes what row `beam_idx[i]` was; also used to repeat and to select rows."""
        index = beam_idx.to(self.device)
        self.batch_size = len(index)
        if self.alone is not None:
            self.alone = [copy.deepcopy(self.alone[i]) for i in index.tolist()]
            return
        self.tensors = {name: tensor.index_select(0, index) for name, tensor in self.tensors.items()}
        self.spare = {name: torch.empty_like(self.tensors[name]) for name in self.spare}
        self.bindings.clear()

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.reorder_cache(torch.arange(self.batch_size).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.reorder_cache(indices)

    def reorder_new_columns(self, start: int, order: torch.Tensor) -> None:
        """Put each row's columns from `start` on in the order (batch_size, columns) of an index."""
        for name in self._growing():
            tensor = self.tensors[name]
            columns = tensor[:, :, start : start + order.shape[1]]
            index = order.to(self.device)[:, None, :, None].expand_as(columns)
            columns.copy_(columns.gather(2, index))

    def crop(self, max_length: int) -> None:
        """Only to a length that it has not passed: a conv state holds the last columns alone and cannot be undone.

        Raises:
            Lfm2Error: if tokens would have to be taken back.
        """
        if max_length < 0:
            max_length += self.length
        if max_length < self.length:
            raise Lfm2Error(
                f"An LFM2 cache of {self.length} tokens cannot be cropped to {max_length}: its convolution states "
                "cannot be undone. Copy the cache beforehand, or run the shorter prompt again."
            )

    def separate(self) -> list[Lfm2Cache]:
        """From now on one cache a row, each of its own length."""
        if self.alone is None:
            self.alone = [copy.deepcopy(row) for row in self.split()]
            self.tensors, self.spare = {}, {}
        return self.alone

    def split(self) -> list[Lfm2Cache]:
        """One cache a row, whose buffers are views of this one's; `join` takes them back."""
        rows = []
        for i in range(self.batch_size):
            row = object.__new__(Lfm2Cache)
            row.layout, row.device, row.length, row.capacity = self.layout, self.device, self.length, self.capacity
            row.batch_size, row.bindings, row.alone = 1, {}, None
            row.tensors = {name: tensor[i : i + 1] for name, tensor in self.tensors.items()}
            row.spare = {name: tensor[i : i + 1] for name, tensor in self.spare.items()}
            rows.append(row)
        return rows

    def join(self, rows: Sequence[Lfm2Cache]) -> None:
        """Become the rows, which were split from here and have all seen the same number of columns since."""
        for name in self.tensors:
            parts = [row.tensors[name] for row in rows]
            if name in self.spare and parts[0].data_ptr() == self.spare[name].data_ptr():
                self.tensors[name], self.spare[name] = self.spare[name], self.tensors[name]
            elif parts[0].data_ptr() != self.tensors[name].data_ptr():  # not a view: the session made it anew
                self.tensors[name] = torch.cat(parts)
                self.bindings.clear()
        self.length, self.capacity = rows[0].length, rows[0].capacity

    def _growing(self) -> list[str]:
        return [cache.past for cache in self.layout.caches if cache.grows]

    def __deepcopy__(self, memo: dict) -> Lfm2Cache:
        twin = object.__new__(Lfm2Cache)
        twin.__dict__ = {
            **self.__dict__,
            "alone": copy.deepcopy(self.alone, memo),
            "tensors": {name: tensor.clone() for name, tensor in self.tensors.items()},
            "spare": {name: tensor.clone() for name, tensor in self.spare.items()},
            "bindings": {},
        }
        return twin

    def __len__(self) -> int:
        return len({cache.layer for cache in self.layout.caches})

    def __repr__(self) -> str:
        return f"Lfm2Cache(batch_size={self.batch_size}, length={self.length}, capacity={self.capacity})"
