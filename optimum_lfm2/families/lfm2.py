"""The dense LFM2. Its layers mix tokens by a short convolution or by attention, and each ends in a SwiGLU.

The reference is transformers' `modeling_lfm2.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from transformers import PretrainedConfig, PreTrainedModel

from optimum_lfm2 import caches
from optimum_lfm2.caches import GROWS, ConvState, GrowingColumns, Kept, head_dim
from optimum_lfm2.graph.blocks import attention, feed_forward, short_conv
from optimum_lfm2.graph.call import AttentionCall, Call, ConvCall, Rotary, attention_call, conv_call
from optimum_lfm2.graph.member import FeedForward, LayerKind, Member


CONV, FULL_ATTENTION = "conv", "full_attention"


def conv_state(config: PretrainedConfig) -> tuple[Kept, ...]:
    """Return what a convolution keeps: the last `conv_L_cache` columns of `B * x`, (hidden_size, conv_L_cache)."""
    return (Kept(caches.CONV, ConvState((config.hidden_size, config.conv_L_cache))),)


def keys_and_values(config: PretrainedConfig) -> tuple[Kept, ...]:
    """Return what attention keeps: keys and values of all columns, each (kv_heads, length, head_dim)."""
    state = GrowingColumns((config.num_key_value_heads, GROWS, head_dim(config)))
    return Kept(caches.KEY, state), Kept(caches.VALUE, state)


def prepare_conv(call: Call, config: PretrainedConfig, rotary: Rotary | None) -> ConvCall:
    """Compute what all convolutions of a call share."""
    return conv_call(call, config.conv_L_cache)


def prepare_attention(call: Call, config: PretrainedConfig, rotary: Rotary | None) -> AttentionCall:
    """Compute what all attention layers of a call share."""
    return attention_call(call, rotary)


LAYER_KINDS = {
    CONV: LayerKind(short_conv, "conv", conv_state, prepare_conv),
    FULL_ATTENTION: LayerKind(attention, "self_attn", keys_and_values, prepare_attention),
}


def dense(config: PretrainedConfig) -> Sequence[FeedForward]:
    """Return the feed-forward of each layer: the same SwiGLU."""
    return [feed_forward] * config.num_hidden_layers


def rotary_of(module: str) -> Callable[[PreTrainedModel], Mapping[str, Rotary]]:
    """Return a function that reads a model's rotary table from the decoder's module of this name."""

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
