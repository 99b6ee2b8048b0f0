"""LFM2, dense: short convolutions and attention, each followed by a SwiGLU. The reference is `modeling_lfm2.py`."""

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
    """The last columns of `B * x`."""
    return (Kept(CONV, (config.hidden_size, config.conv_L_cache)),)


def keys_and_values(config: PretrainedConfig) -> tuple[Kept, ...]:
    """Keys and values of all columns."""
    axes = (config.num_key_value_heads, GROWS, head_dim(config))
    return Kept("key", axes), Kept("value", axes)


def prepare_conv(call: Call, config: PretrainedConfig, rotary: Rotary | None) -> ConvCall:
    return conv_call(call, config.conv_L_cache)


def prepare_attention(call: Call, config: PretrainedConfig, rotary: Rotary | None) -> AttentionCall:
    return attention_call(call, rotary)


def state_of_row(past: Caches, row: int, seen: torch.Tensor) -> Caches:
    return tuple(state[row : row + 1] for state in past)


def fill_state(own: Caches, target: Caches, row: int, columns: torch.Tensor) -> None:
    for state, whole in zip(own, target, strict=True):
        whole[row] = state[0]


def columns_of_row(past: Caches, row: int, seen: torch.Tensor) -> Caches:
    return tuple(columns[row : row + 1, :, seen] for columns in past)


def fill_columns(own: Caches, target: Caches, row: int, columns: torch.Tensor) -> None:
    """The row's new columns, which are the last that transformers keeps."""
    for values, whole in zip(own, target, strict=True):
        whole[row][:, columns] = values[0][:, -len(columns) :].to(whole.dtype)


LAYER_KINDS = {
    CONV: LayerKind(short_conv, "conv", conv_state, prepare_conv, state_of_row, fill_state),
    FULL_ATTENTION: LayerKind(attention, "self_attn", keys_and_values, prepare_attention, columns_of_row, fill_columns),
}


def dense(config: PretrainedConfig) -> Sequence[FeedForward]:
    """The same feed-forward in every layer."""
    return [feed_forward] * config.num_hidden_layers


def rotary_of(module: str) -> Callable[[PreTrainedModel], Mapping[str, Rotary]]:
    """Reads the one rotary table of a model from the decoder's module of this name."""

    def read(model: PreTrainedModel) -> Mapping[str, Rotary]:
        # Made anew, for the model may be on the meta device.
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
