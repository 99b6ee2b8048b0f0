"""The dense LFM2. Its layers mix tokens by a short convolution or by attention, and each ends in a SwiGLU.

The reference is transformers' `modeling_lfm2.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from optimum_lfm2 import caches
from optimum_lfm2.caches import GROWS, ConvState, GrowingColumns, Kept, head_dim
from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.graph.blocks import attention, feed_forward, short_conv
from optimum_lfm2.graph.call import AttentionCall, Call, ConvCall, Rotary, attention_call, conv_call
from optimum_lfm2.graph.member import FeedForward, LayerKind, Member
from optimum_lfm2.weights.gguf import POOLINGS, GgufFields


CONV, FULL_ATTENTION = "conv", "full_attention"
TOKEN_IDS = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}  # with GGUF's names


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


def decoder_of_gguf(fields: GgufFields) -> dict[str, Any]:
    """Return what a GGUF file says that all members of its format have, as in config.json."""
    file = fields.file
    layers, heads, hidden = (
        fields.take(key, int) for key in ("block_count", "attention.head_count", "embedding_length")
    )
    kv_heads = fields.take("attention.head_count_kv", list)  # 0 for a convolution
    table = file.tensors.get("model.embed_tokens.weight")
    if table is None or len(kv_heads) != layers:
        what = "table of embeddings" if table is None else f"number of heads for each of its {layers} layers"
        raise Lfm2Error(f"{file.path} has no {what}. Download or copy it again.")
    usual = hidden // max(heads, 1)
    dim = fields.take("attention.key_length", int, usual)
    for key in ("attention.value_length", "rope.dimension_count"):
        if (other := fields.take(key, int, dim)) != dim:
            raise Lfm2Error(f"{file.path} says that {key} is {other}, and {dim} is exported: the width of a head.")
    ids = {name: file.metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in TOKEN_IDS.items()}
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": max(kv_heads) or heads,
        "layer_types": [FULL_ATTENTION if count else CONV for count in kv_heads],
        "intermediate_size": fields.take("feed_forward_length", int),
        "max_position_embeddings": fields.take("context_length", int),
        "norm_eps": fields.take("attention.layer_norm_rms_epsilon", float),
        "conv_L_cache": fields.take("shortconv.l_cache", int),
        "conv_bias": any(name.endswith(".conv.in_proj.bias") for name in file.tensors),
        "tie_word_embeddings": "lm_head.weight" not in file.tensors,
        "vocab_size": fields.take("vocab_size", int, table.shape[0]),
        **ids,
        **({} if dim == usual else {"head_dim": dim}),
    }


def config_of_gguf(fields: GgufFields) -> dict[str, Any]:
    """Return the config.json of a GGUF file of the architecture `lfm2`: a decoder, or an encoder."""
    causal, pooling = fields.take("attention.causal", bool, True), fields.take("pooling_type", int, 0)
    if pooling not in POOLINGS:
        known = ", ".join(f"{number} ({name})" for number, name in POOLINGS.items())
        raise Lfm2Error(
            f"{fields.file.path} says that pooling_type is {pooling}, and these are exported: {known}. "
            "Export the original checkpoint."
        )
    width = fields.take("embedding_length_out", int, 0)  # of what a dense layer behind the model gives
    headless = "Lfm2Model" if pooling or width else "Lfm2ForCausalLM"
    return {
        **decoder_of_gguf(fields),
        "model_type": "lfm2",
        "architectures": [headless if causal else "Lfm2BidirectionalModel"],
        "block_auto_adjust_ff_dim": False,  # the width is the final one
        "rope_theta": fields.take("rope.freq_base", float),
    }


MEMBER = Member(
    model_type="lfm2",
    architectures={"Lfm2ForCausalLM": "text-generation", "Lfm2Model": "feature-extraction"},
    min_transformers="4.54.0",
    layer_kinds=LAYER_KINDS,
    feed_forwards=dense,
    rotary=rotary_of("rotary_emb"),
    genai_type="lfm2",
    gguf={"lfm2": config_of_gguf},
)
