"""Granite 4.0 H: Mamba-2 and attention without positions, and factors on the embedding, the blocks and the logits.

This file has only the differences from the dense LFM2. The reference is transformers' `modeling_granitemoehybrid.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from optimum_lfm2 import caches, compat
from optimum_lfm2.caches import ConvState, Kept, SsmState
from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.families import lfm2
from optimum_lfm2.fields import FLAG, POSITIVE, SIZE, Field, contradiction
from optimum_lfm2.graph import ops, shapes
from optimum_lfm2.graph.blocks import AttentionParts, attention
from optimum_lfm2.graph.call import Call, ConvCall, Rotary, conv_call
from optimum_lfm2.graph.mamba import conv_width, mamba
from optimum_lfm2.graph.member import Factors, FeedForward, LayerKind, LayerNorms, Member, Mixed, Weight
from optimum_lfm2.graph.recurrence import MIN_ONNXRUNTIME


# The published names of layers, and those that transformers has since 5.24. Transformers.js knows the published ones.
MAMBA, ATTENTION = "mamba", "attention"
SPELLED = {"linear_attention": MAMBA, lfm2.FULL_ATTENTION: ATTENTION}
# How a config.json says that the step has no limit. The last is transformers' spelling, from 5.24 on.
NO_LIMIT = (None, [0, float("inf")], [0, {"__float__": "Infinity"}])
NORMS = LayerNorms("input_layernorm", "post_attention_layernorm")


def scaled_attention(
    hidden: torch.Tensor,
    past: tuple[torch.Tensor, ...] | None,
    shared: Any,
    weight: Weight,
    name: str,
    config: PretrainedConfig,
) -> Mixed:
    """Attention without norms of query and key, whose scores have a factor of the configuration.

    Arguments and results are those of `graph.member.Mixer`.
    """
    parts = AttentionParts(norm=None, out="o_proj", bias=config.attention_bias, scale=config.attention_multiplier)
    return attention(hidden, past, shared, weight, name, config, parts)


def mamba_states(config: PretrainedConfig) -> tuple[Kept, ...]:
    """Return what Mamba-2 keeps: the conv state (conv_width, mamba_d_conv), and the state of the recurrence."""
    state = SsmState((config.mamba_n_heads, config.mamba_d_state, config.mamba_d_head))
    return Kept(caches.CONV, ConvState((conv_width(config), config.mamba_d_conv))), Kept(caches.SSM, state)


def prepare_mamba(call: Call, config: PretrainedConfig, rotary: Rotary | None) -> ConvCall:
    """Compute what all layers of Mamba-2 in a call share."""
    return conv_call(call, config.mamba_d_conv)


def shared_mlp(hidden: torch.Tensor, weight: Weight, name: str) -> torch.Tensor:
    """SwiGLU whose gate and value are one projection. `name` is that of the feed-forward's module."""
    both, down = weight(f"{name}.input_linear.weight"), weight(f"{name}.output_linear.weight")
    gate, value = shapes.parts(ops.linear(hidden, both), *[down.shape[1]] * 2)
    return ops.linear(ops.silu(gate) * value, down)


def dense(config: PretrainedConfig) -> Sequence[FeedForward]:
    """Return the feed-forward of each layer: the same SwiGLU."""
    return [shared_mlp] * config.num_hidden_layers


def rotary(model: PreTrainedModel) -> Mapping[str, Rotary]:
    """Read the rotary table of attention. Published models have none."""
    module: Any = model.base_model.rotary_emb
    if module is None:
        return {}
    made = type(module)(model.config)  # the model may be on the meta device
    return dict.fromkeys((ATTENTION, lfm2.FULL_ATTENTION), (made.inv_freq.float(), made.attention_scaling))


def factors(config: PretrainedConfig) -> Factors:
    """Return what the model multiplies by."""
    return Factors(config.embedding_multiplier, config.residual_multiplier, 1 / config.logits_scaling)


def check(config: Mapping[str, Any]) -> None:
    """Raise `Lfm2Error` for a config.json for which the graph would be wrong."""
    if not config.get("layer_types"):
        raise Lfm2Error(
            f"layer_types in config.json is not there: it says which layers are {MAMBA} and which {ATTENTION}. "
            "Copy the file again."
        )
    if config.get("num_local_experts", 8):  # transformers' default
        raise Lfm2Error(
            f"num_local_experts in config.json is {config.get('num_local_experts', 8)}: Granite with experts is not "
            "exported yet. Its dense models are, such as granite-4.0-h-350m and granite-4.0-h-1b."
        )
    size = config.get("mamba_d_head", "auto")
    if size != "auto" and not SIZE.takes(size):
        raise Lfm2Error(f"mamba_d_head in config.json is {size!r}; it has to be {SIZE} or auto. Copy the file again.")
    heads, groups = config.get("mamba_n_heads", 128), config.get("mamba_n_groups", 1)
    if heads % groups:
        raise contradiction("config.json", f"mamba_n_heads is {heads}", f"mamba_n_groups {groups} does not divide it")
    compat.check_grouped_norm(groups)
    if config.get("time_step_limit") not in NO_LIMIT:
        raise Lfm2Error(
            f"time_step_limit in config.json is {config['time_step_limit']}: transformers heeds it for prompts and not "
            "for the tokens after them, so there is nothing to be equal to. Remove it if the model was trained without."
        )


def written(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config.json with the published names of layers, where transformers 5.24 writes others.

    It also writes the default of `time_step_limit`, which is not JSON that others read.
    """
    kept = {name: value for name, value in config.items() if name != "time_step_limit"}
    return kept | {"layer_types": [SPELLED.get(name, name) for name in config["layer_types"]]}


LAYER_KINDS = {
    MAMBA: LayerKind(mamba, "mamba", mamba_states, prepare_mamba),
    ATTENTION: replace(lfm2.LAYER_KINDS[lfm2.FULL_ATTENTION], mixer=scaled_attention),
}

FIELDS = {
    "rms_norm_eps": Field(float, 0, 1),
    "hidden_act": Field(str, values=("silu", "swish")),
    "shared_intermediate_size": SIZE,
    "attention_bias": FLAG,
    "attention_dropout": Field(float, 0, 1),
    "position_embedding_type": Field(str, optional=True),
    "embedding_multiplier": POSITIVE,
    "residual_multiplier": POSITIVE,
    "attention_multiplier": POSITIVE,
    "logits_scaling": POSITIVE,
    "num_local_experts": Field(int, 0, 4096),
    "mamba_n_heads": SIZE,
    "mamba_n_groups": SIZE,
    "mamba_d_state": SIZE,
    "mamba_d_conv": Field(int, 1, 1024),
    "mamba_expand": Field(int, 1, 1024),
    "mamba_conv_bias": FLAG,
    "mamba_proj_bias": FLAG,
}


MEMBER = Member(
    model_type="granitemoehybrid",
    architectures={"GraniteMoeHybridForCausalLM": "text-generation", "GraniteMoeHybridModel": "feature-extraction"},
    min_transformers="4.57.0",
    layer_kinds=LAYER_KINDS | {other: LAYER_KINDS[name] for other, name in SPELLED.items()},
    feed_forwards=dense,
    rotary=rotary,
    norms=lambda config, layer_type: NORMS,
    final_norm="norm",
    epsilon=lambda config: config.rms_norm_eps,
    feed_forward="shared_mlp",
    factors=factors,
    kernel=lambda config: config.mamba_d_conv,
    fields=FIELDS,
    check=check,
    written=written,
    yields=True,
    title="Granite 4.0 H",
    page="hybrids",
    min_onnxruntime=MIN_ONNXRUNTIME,
    genai_type="granitemoehybrid",
)
