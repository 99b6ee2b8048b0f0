"""What was read stays, so that a text that begins in the same way goes on from there.

Keys and values can be cut anywhere. States cannot, so they are kept at some points of a text: where a prompt ended,
where an answer ended, where two prompts parted, and in between as far as they cost little beside keys and values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from optimum_lfm2.runtime.cache import Lfm2Cache
from optimum_lfm2.runtime.layout import GraphLayout
from optimum_lfm2.runtime.session import GraphSession


Tensors = dict[str, torch.Tensor]
SHARE = 8  # states in between take at most one part in so many of the memory of keys and values


@dataclass(eq=False)
class Text:
    """A text that was read.

    Attributes:
        key: its tokens, int64 (length); a picture's have numbers that depend on what it shows.
        growing: keys and values of one row, with `length` columns or more.
        points: the states after so many tokens.
    """

    key: np.ndarray
    growing: Tensors
    points: dict[int, Tensors] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes."""
        held = [self.growing, *self.points.values()]
        return sum(tensor.nbytes for tensors in held for tensor in tensors.values())


class Prefixes:
    """Texts that were read, the one that was used last at the end.

    Args:
        layout: of the graph that reads them.
        memory: bytes that they may take. Those that were not used longest go first.
    """

    def __init__(self, layout: GraphLayout, memory: int) -> None:
        self._layout = layout
        self._memory = memory
        self._texts: list[Text] = []
        state = sum(_size(layout, cache.past) for cache in layout.states)
        column = sum(_size(layout, cache.past) for cache in layout.caches if cache.grows)
        # How many tokens are between two points; 0 for none.
        self.spacing = -(-SHARE * state // column) if column else 0

    @property
    def size(self) -> int:
        """Bytes that are taken."""
        return sum(text.size for text in self._texts)

    def __len__(self) -> int:
        return len(self._texts)

    def resume(self, key: np.ndarray, graph: GraphSession, capacity: int) -> tuple[Lfm2Cache, int]:
        """Return a cache that has read as much of a text as is kept, without its last token, and where it parts.

        Args:
            key: the tokens of the text, int64 (length).
            capacity: columns of the cache.

        Returns:
            The cache of one row. How many tokens the text shares with one that is kept: reading the rest, keep the
            states there.
        """
        cache = graph.new_cache(1, capacity)
        best, point, parting = None, 0, 0
        for text in self._texts:
            shared = _shared(text.key, key[:-1])
            parting = max(parting, shared)
            reached = max((length for length in text.points if length <= shared), default=0)
            if reached > point:
                best, point = text, reached
        if best is not None:
            self._texts.remove(best)
            self._texts.append(best)
            for name, tensor in best.growing.items():
                cache.tensors[name][:, :, :point] = tensor[:, :, :point]
            for name, tensor in best.points[point].items():
                cache.tensors[name].copy_(tensor)
            cache.length = point
        return cache, parting

    def keep(self, key: np.ndarray, tensors: Mapping[str, torch.Tensor], points: Mapping[int, Tensors]) -> None:
        """Keep a text, and let go what does not fit beside it.

        Args:
            key: its tokens, int64 (length).
            tensors: the caches of one row after it, which nobody writes any more. Keys and values may have further
                columns.
            points: the states after so many tokens; those at its end are taken from `tensors`.
        """
        if not self._memory or not len(key):
            return
        states = {cache.past: tensors[cache.past].clone() for cache in self._layout.states}
        growing = {cache.past: tensors[cache.past] for cache in self._layout.caches if cache.grows}
        new = Text(key, growing, {**points, len(key): states})
        for old in list(self._texts):
            shared = _shared(old.key, key)
            if shared == len(key) < len(old.key):  # a longer text has all of it
                new = Text(old.key, old.growing, {**new.points, **old.points})
            elif shared == len(old.key):  # the beginning of the new one
                new.points = {**old.points, **new.points}
            else:
                continue
            self._texts.remove(old)
        self._texts.append(new)
        while self._texts and self.size > self._memory:
            del self._texts[0]


def _shared(one: np.ndarray, other: np.ndarray) -> int:
    """Return how many tokens two texts have in common at their beginning."""
    length = min(len(one), len(other))
    differ = one[:length] != other[:length]
    return int(differ.argmax()) if differ.any() else length


def _size(layout: GraphLayout, name: str) -> int:
    """Bytes of a row's state, or of one column of its keys or values."""
    count = int(np.prod([size or 1 for size in layout.shapes[name]]))
    return count * torch.empty(0, dtype=layout.dtypes[name]).element_size()
