"""Names, axes and order of the cache tensors of a graph. No other module spells the names out.

A convolution layer keeps a conv state: the last `conv_L_cache` columns of `B * x`. An attention layer keeps a KV
cache, which grows by one column a token. The cache inputs follow each other in layer order, and the cache outputs in
the same order. So a caller can feed each output back to the input at the same position.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from transformers import PretrainedConfig

from optimum_lfm2.errors import Lfm2Error


BATCH = "batch_size"
SEQUENCE = "sequence_length"
PAST = "past_sequence_length"
TOTAL = "past_sequence_length + sequence_length"

LOGITS_TO_KEEP = "num_logits_to_keep"

CONV = "conv"
GROWS = None  # stands in place of a size, for the axis that grows with the sequence


@dataclass(frozen=True)
class Kept:
    """A tensor that a layer keeps from one call to the next.

    Attributes:
        kind: `conv`, `key` or `value`.
        axes: the size of each axis after the batch axis. `GROWS` marks the axis that grows with the sequence.
    """

    kind: str
    axes: tuple[int | None, ...]


@dataclass(frozen=True)
class CacheTensor:
    """A cache tensor of a graph.

    Attributes:
        layer: the index of the layer that keeps it.
        kind: `conv`, `key` or `value`.
        past, present: its names among the graph's inputs and outputs.
        axes: the size of each axis after the batch axis. None marks a size that the graph does not fix.
    """

    layer: int
    kind: str
    past: str
    present: str
    axes: tuple[int | None, ...]

    @property
    def grows(self) -> bool:
        """Whether axis 2 grows with the sequence. It does in a KV cache. Conv states and windows have a fixed width."""
        return self.kind != CONV and self.axes[1] is GROWS

    @property
    def columns(self) -> str:
        """The name of the output for the columns that a call adds to a state. Only some graphs have it."""
        return self.present.replace("present", "columns", 1)

    def shape(self, length: int | str) -> tuple[int | str, ...]:
        """Return the whole shape, batch axis included; `length` is the size or symbol of the axis that grows."""
        return (BATCH, *(length if size is GROWS else size for size in self.axes))

    def columns_shape(self, new: int | str) -> tuple[int | str, ...]:
        """Return the shape of `columns`, batch axis included, for so many new tokens."""
        width, _, *rest = self.shape(new)[1:]
        return (BATCH, width, new, *rest)


# The naming conventions in use. They differ only in the names of a conv state's input and output.
CACHE_NAMES = {
    "hub": ("past_conv.{}", "present_conv.{}"),  # exports on the Hub, and Transformers.js
    "genai": ("past.{}.conv", "present.{}.conv"),  # the builder of onnxruntime-genai
}
_NAMES = (
    re.compile(r"(?P<time>past|present)_(?P<kind>conv)\.(?P<layer>\d+)"),
    re.compile(r"(?P<time>past|present)\.(?P<layer>\d+)\.(?P<kind>conv)"),
    re.compile(r"(?P<time>past|present)(_key_values)?\.(?P<layer>\d+)\.(?P<kind>key|value)"),
)


def read_cache_tensors(inputs: Mapping[str, Sequence[Any]], outputs: Iterable[str]) -> list[CacheTensor]:
    """Find the cache tensors that a graph declares, under either naming convention.

    Args:
        inputs: the shape of each graph input, by name. An axis that is not an int is symbolic.
        outputs: the names of the graph outputs.

    Returns:
        The cache tensors in the order of the inputs.

    Raises:
        Lfm2Error: a cache input has no matching output, or a cache output has no matching input.
    """
    past, present = _recognised(inputs, "past"), _recognised(outputs, "present")
    if past and (unmatched := past.keys() ^ present.keys()):
        layer, kind = min(unmatched)
        side = "input" if (layer, kind) in present else "output"
        raise Lfm2Error(f"The graph has no {side} for the {kind} cache of layer {layer}. Export the model again.")
    return [
        CacheTensor(layer, kind, name, present[layer, kind], _sizes(inputs[name]))
        for (layer, kind), name in past.items()
    ]


def _recognised(names: Iterable[str], time: str) -> dict[tuple[int, str], str]:
    matches = ((name, pattern.fullmatch(name)) for name in names for pattern in _NAMES)
    return {(int(m["layer"]), m["kind"]): name for name, m in matches if m and m["time"] == time}


def _sizes(shape: Sequence[Any]) -> tuple[int | None, ...]:
    return tuple(size if isinstance(size, int) else None for size in shape[1:])


def cache_tensors(layers: Sequence[Sequence[Kept]], names: str = "hub") -> list[CacheTensor]:
    """List the cache tensors of a model.

    Args:
        layers: for each layer, the tensors that it keeps.
        names: the naming convention, a key of `CACHE_NAMES`.

    Returns:
        The cache tensors in the order of the graph's inputs. The outputs have the same order, after `logits`.
    """
    past_conv, present_conv = CACHE_NAMES[names]
    tensors = []
    for layer, kept in enumerate(layers):
        for tensor in kept:
            if tensor.kind == CONV:
                past, present = past_conv.format(layer), present_conv.format(layer)
            else:
                past, present = f"past_key_values.{layer}.{tensor.kind}", f"present.{layer}.{tensor.kind}"
            tensors.append(CacheTensor(layer, tensor.kind, past, present, tensor.axes))
    return tensors


def head_dim(config: PretrainedConfig) -> int:
    """Return the width of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def flatten(layers: Iterable[Sequence[Any]]) -> list[Any]:
    """Flatten `[(conv,), (key, value), ...]`, one tuple a layer, to a list in the order of `cache_tensors`."""
    return [tensor for layer in layers for tensor in layer]


def unflatten(values: Sequence[Any], tensors: Sequence[CacheTensor]) -> list[tuple[Any, ...]]:
    """Undo `flatten`: group `values`, one for each of `tensors`, into one tuple a layer."""
    pairs = zip(tensors, values, strict=True)
    return [tuple(value for _, value in layer) for _, layer in groupby(pairs, key=lambda pair: pair[0].layer)]
