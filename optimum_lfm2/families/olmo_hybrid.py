"""Olmo-Hybrid: gated delta nets, and attention with norms after its blocks and over the whole width of query and key.

This file has only the differences from the dense LFM2. The reference is transformers' `modeling_olmo_hybrid.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
from transformers import PretrainedConfig, PreTrainedModel

from optimum_lfm2 import caches
from optimum_lfm2.caches import ConvState, Kept, Recurrent
from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.families import lfm2
from optimum_lfm2.fields import FLAG, SIZE, Field, contradiction
from optimum_lfm2.graph.blocks import AttentionParts, attention, feed_forward
from optimum_lfm2.graph.call import Call, ConvCall, Rotary, conv_call
from optimum_lfm2.graph.delta import conv_widths, delta_net
from optimum_lfm2.graph.member import LayerKind, LayerNorms, Member, Mixed, Weight
from optimum_lfm2.graph.recurrence import MIN_ONNXRUNTIME
from optimum_lfm2.weights.checkpoint import Checkpoint, tensor_shape


LINEAR_ATTENTION = "linear_attention"
DELTA_NORMS = LayerNorms("input_layernorm", "post_attention_layernorm")
ATTENTION_NORMS = LayerNorms(
    None, None, after_mixer="post_attention_layernorm", after_feed_forward="post_feedforward_layernorm"
)


def normed_attention(
    hidden: torch.Tensor,
    past: tuple[torch.Tensor, ...] | None,
    shared: Any,
    weight: Weight,
    name: str,
    config: PretrainedConfig,
) -> Mixed:
    """Attention whose norms of query and key are over all heads at once. See `graph.member.Mixer`."""
    parts = AttentionParts(
        norm="norm", whole=True, epsilon=config.rms_norm_eps, out="o_proj", bias=config.attention_bias
    )
    return attention(hidden, past, shared, weight, name, config, parts)


def recurrent_state(config: PretrainedConfig) -> Kept:
    """Return the state of the recurrence."""
    axes = (config.linear_num_value_heads, config.linear_key_head_dim, config.linear_value_head_dim)
    return Kept(caches.RECURRENT, Recurrent(axes))


def delta_states(config: PretrainedConfig) -> tuple[Kept, ...]:
    """Return what a delta net keeps: the conv states of query, key and value, and the state of the recurrence."""
    roles = caches.CONV_QUERY, caches.CONV_KEY, caches.CONV_VALUE
    states = [ConvState((width, config.linear_conv_kernel_dim)) for width in conv_widths(config)]
    return *map(Kept, roles, states), recurrent_state(config)


def packed_states(config: PretrainedConfig) -> tuple[Kept, ...]:
    """Return the same with one conv state, in which query, key and value follow each other."""
    state = ConvState((sum(conv_widths(config)), config.linear_conv_kernel_dim))
    return Kept(caches.CONV, state), recurrent_state(config)


def prepare_delta(call: Call, config: PretrainedConfig, rotary: Rotary | None) -> ConvCall:
    """Compute what all delta nets in a call share."""
    return conv_call(call, config.linear_conv_kernel_dim)


def norms(config: PretrainedConfig, layer_type: str) -> LayerNorms:
    """Return the norms of a layer: before the blocks of a delta net, after those of attention."""
    return DELTA_NORMS if layer_type == LINEAR_ATTENTION else ATTENTION_NORMS


def rotary(model: PreTrainedModel) -> Mapping[str, Rotary]:
    """Read the rotary table of attention. Published models have none."""
    module: Any = model.base_model.rotary_emb
    if module is None:
        return {}
    made = type(module)(model.config)  # the model may be on the meta device
    return {lfm2.FULL_ATTENTION: (made.inv_freq.float(), made.attention_scaling)}


class OlmoCheckpoint(Checkpoint):
    """Published files have the kernels of query, key and value apart, and other names for the norms of delta nets.

    transformers 5.24 joins the kernels as it loads them, and saves equal thirds, whatever the widths were. So parts are
    joined, and only their sum has to fit.
    """

    RENAMED: ClassVar[Mapping[str, str]] = {
        ".input_layernorm.": ".attention_layer_norm.",
        ".post_attention_layernorm.": ".feedforward_layer_norm.",
    }
    JOINED: ClassVar[str] = ".linear_attn.conv1d."
    PARTS: ClassVar[tuple[str, ...]] = tuple(f".linear_attn.{part}_conv1d." for part in "qkv")

    def _parts(self, name: str) -> list[str]:
        """Return the stored names of the parts of a kernel, or none where it is stored as a whole."""
        stored = self._stored[name]
        return [stored.replace(self.PARTS[0], part) for part in self.PARTS] if self.PARTS[0] in stored else []

    def _stored_name(self, name: str) -> str:
        try:
            return super()._stored_name(name)
        except Lfm2Error:
            if self.JOINED not in name:
                raise
            return super()._stored_name(name.replace(self.JOINED, self.PARTS[0]))

    def _needed(self, name: str) -> dict[str, tuple[int, ...]]:
        if not (parts := self._parts(name)):
            return super()._needed(name)
        for part in parts:
            super()._stored_name(part)  # refuses one that is missing
        found = {part: tensor_shape(self._files[part], part) for part in parts}
        rows, *rest = self._parameters[name].shape
        if sum(shape[0] for shape in found.values()) != rows or any(
            list(shape[1:]) != rest for shape in found.values()
        ):
            raise Lfm2Error(
                f"{', '.join(parts)} in {self._files[parts[0]]} have the shapes {', '.join(map(str, found.values()))}; "
                f"together config.json asks for {(rows, *rest)}. One of the two belongs to another model."
            )
        return found

    def __getitem__(self, name: str) -> Any:
        if not (parts := self._parts(name)):
            return super().__getitem__(name)
        return torch.cat([self._read(part, self._parameters[name].dtype) for part in parts])


def check(config: Mapping[str, Any]) -> None:
    """Raise `Lfm2Error` for a config.json for which the graph would be wrong."""
    heads = config.get("num_attention_heads", 30)
    keys, values = (config.get(f"linear_num_{part}_heads") or heads for part in ("key", "value"))
    if values % keys:
        raise contradiction(
            "config.json", f"linear_num_value_heads is {values}", f"linear_num_key_heads {keys} does not divide it"
        )


DELTA = LayerKind(delta_net, "linear_attn", delta_states, prepare_delta)
LAYER_KINDS = {
    LINEAR_ATTENTION: DELTA,
    lfm2.FULL_ATTENTION: replace(lfm2.LAYER_KINDS[lfm2.FULL_ATTENTION], mixer=normed_attention),
}
PACKED_DELTA = replace(DELTA, mixer=partial(delta_net, packed=True), caches=packed_states)

OPTIONAL_SIZE = replace(SIZE, optional=True)
FIELDS = {
    "rms_norm_eps": Field(float, 0, 1),
    "hidden_act": Field(str, values=("silu", "swish")),
    "attention_bias": FLAG,
    "attention_dropout": Field(float, 0, 1),
    "num_key_value_heads": OPTIONAL_SIZE,
    "rope_theta": Field(float, 1e-30, 1e30, optional=True),  # null means no positions
    "linear_num_key_heads": OPTIONAL_SIZE,
    "linear_num_value_heads": OPTIONAL_SIZE,
    "linear_key_head_dim": OPTIONAL_SIZE,
    "linear_value_head_dim": OPTIONAL_SIZE,
    "linear_conv_kernel_dim": Field(int, 1, 1024),
    "linear_allow_neg_eigval": FLAG,
}


MEMBER = Member(
    model_type="olmo_hybrid",
    architectures={"OlmoHybridForCausalLM": "text-generation", "OlmoHybridModel": "feature-extraction"},
    min_transformers="5.3.0",
    layer_kinds=LAYER_KINDS,
    feed_forwards=lambda config: (
        [partial(feed_forward, parts=("gate_proj", "up_proj", "down_proj"))] * config.num_hidden_layers
    ),
    rotary=rotary,
    norms=norms,
    final_norm="norm",
    epsilon=lambda config: config.rms_norm_eps,
    feed_forward="mlp",
    kernel=lambda config: config.linear_conv_kernel_dim,
    checkpoint=OlmoCheckpoint,
    # They decide how long the state remembers, and have one row a head.
    in_8_bits=("a_proj", "b_proj"),
    fields=FIELDS,
    check=check,
    yields=True,
    title="Olmo-Hybrid",
    page="hybrids",
    min_onnxruntime=MIN_ONNXRUNTIME,
)
MEMBER = replace(
    MEMBER, packed=replace(MEMBER, layer_kinds=LAYER_KINDS | {LINEAR_ATTENTION: PACKED_DELTA}, genai_type="olmo")
)
