"""Names, axes and order of the cache tensors of an LFM2 graph: the one place that knows them.

A convolution layer keeps the last `conv_L_cache` columns of `B * x` (the conv state), an attention layer keeps keys
and values that grow by one column a token. In the graph's inputs and outputs the layers follow each other in layer
order, so that a loop which knows nothing can zip present to past by position.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from optimum_lfm2.errors import Lfm2Error


BATCH = "batch_size"
SEQUENCE = "sequence_length"
PAST = "past_sequence_length"
TOTAL = "past_sequence_length + sequence_length"

LOGITS_TO_KEEP = "num_logits_to_keep"

# What the name of a graph ends in whose keys and values are int8, beside the one in float that it was made of.
QUANTIZED_CACHE = "_kv8"

CONV = "conv"
GROWS = None  # in place of a size: the axis that grows with the sequence


@dataclass(frozen=True)
class Kept:
    """A tensor that a layer keeps from call to call.

    Attributes:
        kind: `conv`, `key` or `value`.
        axes: the sizes of its axes after the batch, `GROWS` for the one that grows with the sequence.
    """

    kind: str
    axes: tuple[int | None, ...]


@dataclass(frozen=True)
class CacheTensor:
    """A cache tensor of a graph.

    Attributes:
        layer: the layer that keeps it.
        kind: `conv`, `key` or `value`.
        past, present: its names among the graph's inputs and outputs.
        axes: the sizes of its axes after the batch; None for a size that the graph does not fix.
    """

    layer: int
    kind: str
    past: str
    present: str
    axes: tuple[int | None, ...]

    @property
    def grows(self) -> bool:
        """Whether axis 2 grows with the sequence, as that of keys and values; conv states have a fixed width."""
        return self.kind != CONV and self.axes[1] is GROWS

    def shape(self, length: int | str) -> tuple[int | str, ...]:
        """Its shape where the axis that grows has this size or symbol."""
        return (BATCH, *(length if size is GROWS else size for size in self.axes))


# The conventions that people use, by the names of a conv state's input and output. Keys and values are named alike.
CACHE_NAMES = {
    "hub": ("past_conv.{}", "present_conv.{}"),
    "genai": ("past.{}.conv", "present.{}.conv"),  # of onnxruntime-genai's builder
}
_NAMES = (
    re.compile(r"(?P<time>past|present)_(?P<kind>conv)\.(?P<layer>\d+)"),
    re.compile(r"(?P<time>past|present)\.(?P<layer>\d+)\.(?P<kind>conv)"),
    re.compile(r"(?P<time>past|present)(_key_values)?\.(?P<layer>\d+)\.(?P<kind>key|value)"),
)


def read_cache_tensors(inputs: Mapping[str, Sequence[Any]], outputs: Iterable[str]) -> list[CacheTensor]:
    """The cache tensors that a graph declares, in the order of its inputs, whichever convention names them.

    Args:
        inputs: the shape of each input by name; a symbol is anything but an int.
        outputs: the names of the outputs.

    Raises:
        Lfm2Error: for a cache input without its output, or the reverse.
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
    """The cache tensors of a model, in the order of the graph's inputs (and of its outputs after the first).

    Args:
        layers: what each layer keeps.
        names: the convention, a key of `CACHE_NAMES`.
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
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def flatten(layers: Iterable[Sequence[Any]]) -> list[Any]:
    """`[(conv,), (key, value), ...]`, one tuple a layer, as the flat list that `cache_tensors` describes."""
    return [tensor for layer in layers for tensor in layer]


def unflatten(values: Sequence[Any], tensors: Sequence[CacheTensor]) -> list[tuple[Any, ...]]:
    """The inverse of `flatten`: a value for each of the cache tensors, as one tuple a layer."""
    pairs = zip(tensors, values, strict=True)
    return [tuple(value for _, value in layer) for _, layer in groupby(pairs, key=lambda pair: pair[0].layer)]


def with_float_caches(files: Iterable[Path]) -> list[Path]:
    """The files that stand for a folder: not those beside the one that they were made of, which are taken by name."""
    files = sorted(files)
    return [file for file in files if not file.stem.endswith(QUANTIZED_CACHE)] or files
