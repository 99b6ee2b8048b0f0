"""Names, axes and order of the cache tensors of an LFM2 graph: the one place that knows them.

A convolution layer keeps the last `conv_L_cache` columns of `B * x` (the conv state), an attention layer keeps keys and
values that grow by one column a token. In the graph's inputs and outputs the layers follow each other in layer order, so
that a loop which knows nothing can zip present to past by position.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig


BATCH = "batch_size"
SEQUENCE = "sequence_length"
PAST = "past_sequence_length"
TOTAL = "past_sequence_length + sequence_length"

LOGITS_TO_KEEP = "num_logits_to_keep"

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


def cache_tensors(layer_types: Sequence[str]) -> list[CacheTensor]:
    """The cache tensors of a model, in the order of the graph's inputs (and of its outputs after the first).

    Args:
        layer_types: `conv` or `full_attention` for each layer, as in `Lfm2Config.layer_types`.
    """
    tensors = []
    for layer, layer_type in enumerate(layer_types):
        if layer_type == CONV:
            tensors.append(CacheTensor(layer, CONV, f"past_conv.{layer}", f"present_conv.{layer}"))
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
