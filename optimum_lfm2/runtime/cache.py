"""The cache of a generation: keys and values, which grow, and states of fixed size."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache

from optimum_lfm2.caches import GROWS
from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.runtime.files import FileIdentity
from optimum_lfm2.runtime.layout import GraphLayout
from optimum_lfm2.runtime.record import Record
from optimum_lfm2.runtime.rollback import Rollback


MIN_CAPACITY = 64


class Lfm2Cache(Rollback, Cache):
    """The cache that `forward` and `generate` take and return. It holds both kinds of caches of all layers.

    Keys and values lie in buffers (batch_size, kv_heads, capacity, head_dim). Their first `get_seq_length()` columns
    are in use, and the capacity doubles when it is used up. States have a fixed shape: those of convolutions, and the
    windows of sliding attention. Each state has two buffers, which take turns as past and present.

    `forward` changes the cache that it is given. Copy it with `copy.deepcopy` to continue twice from one point. Any
    session of the model's file can continue it, and no other model can. It can be pickled. A loaded cache belongs to
    the first model that takes it and has the same layers.

    `crop` takes tokens back that the cache has recorded. Reordering rows and copying the cache forget the record.
    """

    is_compileable = False  # type: ignore[assignment]  # properties of transformers' class, which ask its layers
    is_initialized = True  # type: ignore[assignment]
    is_linear = (False,)  # not all layers: so `generate` asks how many columns were seen
    batch_size = 0  # type: ignore[assignment]
    hidden: torch.Tensor | None = None  # here for caches that an older release pickled

    def __init__(self, layout: GraphLayout, batch_size: int, device: torch.device, capacity: int = 0) -> None:
        super().__init__(layers=[])  # the graph updates the tensors below; transformers' layers would hold them twice
        self.layout = layout
        self.batch_size = batch_size
        self.device = device
        self.length = 0
        self.capacity = capacity
        self.tensors: dict[str, torch.Tensor] = {}
        self.spare: dict[str, torch.Tensor] = {}
        for cache in layout.caches:
            shape = (batch_size, *(capacity if size is GROWS else size for size in layout.shapes[cache.past]))
            # Memory is touched when it is used: a graph reads no column of keys and values that it has not written.
            make = torch.empty if cache.grows else torch.zeros
            self.tensors[cache.past] = make(shape, dtype=layout.dtypes[cache.past], device=device)
            if not cache.grows:
                self.spare[cache.past] = torch.empty_like(self.tensors[cache.past])
        # For graphs that are wrong on masked tokens: a cache for each row, without its masked tokens.
        self.alone: list[Lfm2Cache] | None = None
        self.record = Record()
        # Set while rows change places within the buffers: an interrupt then leaves nothing to go on from.
        self.broken = False
        # Columns behind the end of a row, bool (rows, columns), which stay hidden whatever a later mask says; or None.
        self.hidden = None
        # What a session prepared for these very buffers: dropped when they are replaced, or another session comes.
        self.bindings: dict[object, object] = {}
        self.bound_to: object = None
        # The model whose cache it is; None before a model takes it.
        self.made_by: FileIdentity | None = None

    def get_max_cache_shape(self, layer_idx: int | None = 0) -> int:
        """-1: it grows as it must."""
        return -1

    @property
    def max_batch_size(self) -> int:
        """The number of rows."""
        return self.batch_size

    @property
    def max_cache_len(self) -> int:
        """-1: it grows as it must."""
        return -1

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: transformers 5's name for `get_max_cache_shape`."""
        return -1

    def has_previous_state(self, *_: Any) -> bool:
        """Whether it has seen a token."""
        return self.get_seq_length() > 0

    def update(self, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Raises `Lfm2Error`: the graph itself writes keys and values."""
        raise Lfm2Error("This cache is written by the exported graph alone. Pass it to forward or generate.")

    def reset(self) -> None:
        """Forget every token."""
        self.__init__(self.layout, self.batch_size, self.device, self.capacity)  # type: ignore[misc]

    def reserve(self, length: int, exact: bool = False) -> None:
        """Make room for `length` columns. With `exact`, make room for no more; else the capacity at least doubles."""
        if length <= self.capacity:
            return
        capacity = length if exact else max(length, 2 * self.capacity, MIN_CAPACITY)
        self._rebuild(lambda old: old, self.batch_size, capacity)

    def _rebuild(self, rows: Any, batch_size: int, capacity: int) -> None:
        """Move the used columns to buffers of `capacity`; `rows` chooses the rows of a tensor."""
        tensors = {}
        for name, old in self.tensors.items():
            if name in self.spare:
                tensors[name] = rows(old)
                continue
            tensors[name] = old.new_empty((batch_size, old.shape[1], capacity, old.shape[3]))
            tensors[name][:, :, : self.length] = rows(old[:, :, : self.length])
        spare = {name: torch.empty_like(tensors[name]) for name in self.spare}
        # At once: an interrupt in between would leave buffers that do not belong together.
        self.__dict__.update(tensors=tensors, spare=spare, batch_size=batch_size, capacity=capacity, bindings={})

    def hide(self, columns: torch.Tensor) -> None:
        """Hide columns, bool (rows, columns), from later calls too: padding, which no row has read."""
        if self.hidden is not None:
            columns = columns.clone()
            columns[:, : self.hidden.shape[1]] |= self.hidden
        self.hidden = columns

    def shown(self, mask: torch.Tensor) -> torch.Tensor:
        """Return a mask, (rows, columns from the first one on), without the columns that stay hidden."""
        if self.hidden is None:
            return mask
        hidden = self.hidden[:, : self.get_seq_length()].to(mask.device)
        return torch.cat([mask[:, : hidden.shape[1]].masked_fill(hidden, 0), mask[:, hidden.shape[1] :]], dim=1)

    def skip(self, columns: int) -> None:
        """Append masked columns without a call of the graph. They are zeros, since a masked column must be finite."""
        self.reserve(self.length + columns, exact=True)
        for name in self._growing():
            self.tensors[name][:, :, self.length : self.length + columns] = 0
        self.length += columns

    def swap(self) -> None:
        """Exchange the two buffers of each state after a call has written the present one."""
        self.tensors, self.spare = {**self.tensors, **self.spare}, {name: self.tensors[name] for name in self.spare}

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Copy row `beam_idx[i]` to row i. It also repeats and selects rows."""
        chosen = beam_idx.tolist()
        if chosen == list(range(self.batch_size)):
            return
        self.record.select(beam_idx)
        if self.hidden is not None:
            self.hidden = self.hidden.index_select(0, beam_idx.to(self.hidden.device))
        if self.alone is not None:
            self.alone = [copy.deepcopy(self.alone[i]) for i in chosen]
            self.batch_size = len(chosen)
            return
        index = beam_idx.to(self.device)
        if len(chosen) != self.batch_size:
            self._rebuild(lambda tensor: tensor.index_select(0, index), len(chosen), self.capacity)
            return
        # In place, the rows that change and the columns in use: beams pay for what they have written.
        moved = torch.tensor([i for i, source in enumerate(chosen) if i != source], device=self.device)
        self.broken = True
        for name, tensor in self.tensors.items():
            used = tensor if name in self.spare else tensor[:, :, : self.length]
            used[moved] = used[index[moved]]
        self.broken = False

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

    def separate(self) -> list[Lfm2Cache]:
        """Replace the cache by one for each row, each of its own length, and return them."""
        if self.alone is None:
            self.alone = [copy.deepcopy(row) for row in self.split()]
            self.tensors, self.spare = {}, {}
        return self.alone

    def split(self) -> list[Lfm2Cache]:
        """Return a cache for each row. Its buffers are views of this cache's; `join` puts the rows together again."""
        return [
            self._twin(
                batch_size=1,
                hidden=None,  # whoever splits a cache has masked what is hidden
                tensors={name: tensor[i : i + 1] for name, tensor in self.tensors.items()},
                spare={name: tensor[i : i + 1] for name, tensor in self.spare.items()},
            )
            for i in range(self.batch_size)
        ]

    def join(self, rows: Sequence[Lfm2Cache]) -> None:
        """Take the contents of rows that `split` returned. All have seen the same number of columns since."""
        tensors = {}
        for name, mine in self.tensors.items():
            parts = [row.tensors[name] for row in rows]
            # A row's state is in one or the other of its buffers, which depends on the number of its calls.
            is_view = name not in self.spare and parts[0].data_ptr() == mine.data_ptr()
            tensors[name] = mine if is_view else torch.cat(parts)
        self.tensors = tensors
        self.spare = {name: torch.empty_like(tensors[name]) for name in self.spare}
        self.bindings.clear()
        self.length, self.capacity = rows[0].length, rows[0].capacity

    def _growing(self) -> list[str]:
        return [cache.past for cache in self.layout.caches if cache.grows]

    def _twin(self, **changes: Any) -> Lfm2Cache:
        twin = object.__new__(Lfm2Cache)
        fresh: dict[str, Any] = {
            "layers": [],
            "bindings": {},
            "bound_to": None,
            "record": Record(features=self.record.features),
        }
        twin.__dict__ = {**self.__dict__, **fresh, **changes}
        return twin

    def __getstate__(self) -> dict[str, Any]:
        """For pickle: what counts, without the model's file, which may lie elsewhere when the cache is loaded."""
        return {**self._used(), "made_by": None}

    def _used(self) -> dict[str, Any]:
        """The columns in use, and nothing of a session."""
        tensors = {
            name: (tensor if name in self.spare else tensor[:, :, : self.length]).clone(
                memory_format=torch.contiguous_format
            )
            for name, tensor in self.tensors.items()
        }
        spare = {name: torch.empty_like(tensors[name]) for name in self.spare}
        changes = {"tensors": tensors, "spare": spare, "capacity": self.length, "bindings": {}, "bound_to": None}
        return {**self.__dict__, **changes, "record": self.record.copied()}

    def __deepcopy__(self, memo: dict) -> Lfm2Cache:
        twin = object.__new__(Lfm2Cache)
        twin.__dict__ = {**self._used(), "layers": [], "alone": copy.deepcopy(self.alone, memo)}
        return twin

    def __len__(self) -> int:
        return len({cache.layer for cache in self.layout.caches})

    def __repr__(self) -> str:
        return f"Lfm2Cache(batch_size={self.batch_size}, length={self.get_seq_length()}, capacity={self.capacity})"
