"""The dense LFM2. Its layers mix tokens by a short convolution or by attention, and each ends in a SwiGLU.

The reference is transformers' `modeling_lfm2.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from transformers import PretrainedConfig, PreTrainedModel

from optimum_lfm2.caches import CONV, GROWS, Kept, head_dim
from optimum_lfm2.graph.blocks import attention, feed_forward, short_conv
from optimum_lfm2.graph.call import AttentionCall, Call, ConvCall, Rotary, attention_call, conv_call
from optimum_lfm2.graph.member import Caches, FeedForward, LayerKind, Member


FULL_ATTENTION = "full_attention"


def conv_state(config: PretrainedConfig) -> tuple[Kept, ...]:
    """Return what a convolution keeps: the last `conv_L_cache` columns of `B * x`, (hidden_size, conv_L_cache)."""
    return (Kept(CONV, (config.hidden_size, config.conv_L_cache)),)


def keys_and_values(config: PretrainedConfig) -> tuple[Kept, ...]:
    """Return what attention keeps: keys and values of all columns, each (kv_heads, length, head_dim)."""
    axes = (config.num_key_value_heads, GROWS, head_dim(config))
    return Kept("key", axes), Kept("value", axes)


def prepare_conv(call: Call, config: PretrainedConfig, rotary: Rotary | None) -> ConvCall:
    """Compute what all convolutions of a call share."""
    return conv_call(call, config.conv_L_cache)


def prepare_attention(call: Call, config: PretrainedConfig, rotary: Rotary | None) -> AttentionCall:
    """Compute what all attention layers of a call share."""
    return attention_call(call, rotary)


def state_of_row(past: Caches, row: int, seen: torch.Tensor) -> Caches:
    """Take a row's state, (1, hidden_size, conv_L_cache), from that of all rows."""
    return tuple(state[row : row + 1] for state in past)


def fill_state(own: Caches, target: Caches, row: int, columns: torch.Tensor) -> None:
    """Write a row's state over that of all rows."""
    for state, whole in zip(own, target, strict=True):
        whole[row] = state[0]


def columns_of_row(past: Caches, row: int, seen: torch.Tensor) -> Caches:
    """Take the columns that a row sees, (1, kv_heads, seen, head_dim), from the keys and values of all rows."""
    return tuple(columns[row : row + 1, :, seen] for columns in past)


def fill_columns(own: Caches, target: Caches, row: int, columns: torch.Tensor) -> None:
    """Write a row's new columns over those of all rows. They are the last ones in transformers' cache."""
    for values, whole in zip(own, target, strict=True):
        whole[row][:, columns] = values[0][:, -len(columns) :].to(whole.dtype)


LAYER_KINDS = {
    CONV: LayerKind(short_conv, "conv", conv_state, prepare_conv, state_of_row, fill_state),
    FULL_ATTENTION: LayerKind(attention, "self_attn", keys_and_values, prepare_attention, columns_of_row, fill_columns),
}


def dense(config: PretrainedConfig) -> Sequence[FeedForward]:
    """Return the feed-forward of each layer: the same SwiGLU."""
    return [feed_forward] * config.num_hidden_layers


def rotary_of(module: str) -> Callable[[PreTrainedModel], Mapping[str, Rotary]]:
    """Make a reader of a model's rotary table, which the decoder's module of this name computes."""

    def read(model: PreTrainedModel) -> Mapping[str, Rotary]:
        # The model may be on the meta device, so its module may hold no values.
        rotary = type(getattr(model.base_model, module))(model.config)
        return {FULL_ATTENTION: (rotary.inv_freq.float(), rotary.attention_scaling)}

    return read


MEMBER = Member(
    model_type="lfm2",
    architectures={"Lfm2ForCausalLM": "text-generation", "Lfm2Model": "feature-extraction"},
    min_transformers="4.54.0",
    layer_kinds=LAYER_KINDS,
    feed_forwards=dense,
    rotary=rotary_of("rotary_emb"),
    genai_type="lfm2",
)
