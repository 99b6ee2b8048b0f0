"""Names, axes and order of the cache tensors of an LFM2 graph: the one place that knows them.

A convolution layer keeps the last `conv_L_cache` columns of `B * x` (the conv state), an attention layer keeps keys
and values that grow by one column a token. In the graph's inputs and outputs the layers follow each other in layer
order, so that a loop which knows nothing can zip present to past by position.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
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
ATTENTION = "full_attention"


@dataclass(frozen=True)
class CacheTensor:
    """One cache tensor: its layer, what it holds (`conv`, `key` or `value`), its input name and its output name."""

    layer: int
    kind: str
    past: str
    present: str

    @property
    def grows(self) -> bool:
        """Whether axis 2 grows with the sequence (keys and values), or is a fixed width (conv states)."""
        return self.kind != CONV

    def shape(self, config: PretrainedConfig, length: int | str) -> tuple[int | str, ...]:
        """Its shape for a model: symbols for the axes that vary, numbers for all others."""
        if self.grows:
            return (BATCH, config.num_key_value_heads, length, head_dim(config))
        return (BATCH, config.hidden_size, config.conv_L_cache)


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


def read_cache_tensors(inputs: Iterable[str], outputs: Iterable[str]) -> list[CacheTensor]:
    """The cache tensors that a graph declares, in the order of its inputs, whichever convention names them.

    Raises:
        Lfm2Error: for a cache input without its output, or the reverse.
    """
    past, present = _recognised(inputs, "past"), _recognised(outputs, "present")
    if past and (unmatched := past.keys() ^ present.keys()):
        layer, kind = min(unmatched)
        side = "input" if (layer, kind) in present else "output"
        raise Lfm2Error(f"The graph has no {side} for the {kind} cache of layer {layer}. Export the model again.")
    return [CacheTensor(layer, kind, name, present[layer, kind]) for (layer, kind), name in past.items()]


def _recognised(names: Iterable[str], time: str) -> dict[tuple[int, str], str]:
    matches = ((name, pattern.fullmatch(name)) for name in names for pattern in _NAMES)
    return {(int(m["layer"]), m["kind"]): name for name, m in matches if m and m["time"] == time}


def cache_tensors(layer_types: Sequence[str], names: str = "hub") -> list[CacheTensor]:
    """The cache tensors of a model, in the order of the graph's inputs (and of its outputs after the first).

    Args:
        layer_types: `conv` or `full_attention` for each layer, as in `Lfm2Config.layer_types`.
        names: the convention, a key of `CACHE_NAMES`.
    """
    past_conv, present_conv = CACHE_NAMES[names]
    tensors = []
    for layer, layer_type in enumerate(layer_types):
        if layer_type == CONV:
            tensors.append(CacheTensor(layer, CONV, past_conv.format(layer), present_conv.format(layer)))
        else:
            tensors.extend(
                CacheTensor(layer, kind, f"past_key_values.{layer}.{kind}", f"present.{layer}.{kind}")
                for kind in ("key", "value")
            )
    return tensors


def head_dim(config: PretrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def flatten(layers: Iterable[Sequence[Any]]) -> list[Any]:
    """`[(conv,), (key, value), ...]`, one tuple a layer, as the flat list that `cache_tensors` describes."""
    return [tensor for layer in layers for tensor in layer]


def unflatten(tensors: Sequence[Any], layer_types: Sequence[str]) -> list[tuple[Any, ...]]:
    """The inverse of `flatten`."""
    remaining = iter(tensors)
    return [
        (next(remaining),) if layer_type == CONV else (next(remaining), next(remaining)) for layer_type in layer_types
    ]


def with_float_caches(files: Iterable[Path]) -> list[Path]:
    """The files that stand for a folder: not those beside the one that they were made of, which are taken by name."""
    files = sorted(files)
    return [file for file in files if not file.stem.endswith(QUANTIZED_CACHE)] or files
