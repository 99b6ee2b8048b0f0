"""LFM3: sliding attention beside full attention and convolutions, gates on heads, norms after the blocks.

This file has only the differences from the dense LFM2. The reference is transformers' `modeling_lfm3.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel

from optimum_lfm2.caches import KEY, VALUE, Kept, Window, head_dim
from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.families import lfm2
from optimum_lfm2.fields import FLAG, Field, ropes
from optimum_lfm2.graph.blocks import AttentionParts, attention
from optimum_lfm2.graph.call import AttentionCall, Call, Rotary
from optimum_lfm2.graph.member import LFM2_NORMS, LayerKind, LayerNorms, Member, Mixed, Weight, published
from optimum_lfm2.graph.sliding import SlidingCall, masked_attention_call, sliding_call
from optimum_lfm2.weights.checkpoint import Checkpoint


SLIDING_ATTENTION = "sliding_attention"
DEFAULT, PROPORTIONAL = "default", "proportional"
PARTIAL = "partial_rotary_factor"
# What `auto_map` of published checkpoints names. transformers has the same.
PUBLISHED_CODE = (
    "configuration_lfm3.Lfm3Config",
    "modeling_lfm3.Lfm3Model",
    "modeling_lfm3.Lfm3ForCausalLM",
)


def gated_attention(
    hidden: torch.Tensor,
    past: tuple[torch.Tensor, ...] | None,
    shared: Any,
    weight: Weight,
    name: str,
    config: PretrainedConfig,
) -> Mixed:
    """Attention as in LFM2, with LFM3's names, and with a gate and biases if the configuration asks for them.

    Arguments and results are those of `graph.member.Mixer`.
    """
    gate = "g_proj" if config.use_attention_gate else None
    parts = AttentionParts(norm="norm", out="o_proj", bias=config.attention_bias, gate=gate)
    return attention(hidden, past, shared, weight, name, config, parts)


def window_state(config: PretrainedConfig) -> tuple[Kept, ...]:
    """Return what sliding attention keeps: keys and values of a row's last `sliding_window` unmasked tokens.

    Each is (kv_heads, sliding_window, head_dim), the newest token last.
    """
    state = Window((config.num_key_value_heads, config.sliding_window, head_dim(config)))
    return Kept(KEY, state), Kept(VALUE, state)


def prepare_sliding(call: Call, config: PretrainedConfig, rotary: Rotary | None) -> SlidingCall:
    """Compute what all layers of sliding attention share in a call, with windows for caches."""
    return sliding_call(call, rotary, config)  # type: ignore[arg-type]  # these layers rotate


def rotary_by_kind(model: PreTrainedModel) -> Mapping[str, Rotary]:
    """Read the rotary tables. LFM3 has one for each kind of attention."""
    rotary: Any = type(model.base_model.rotary_emb)(model.config)  # made anew, for the model may be on the meta device
    return {
        kind: (getattr(rotary, f"{kind}_inv_freq").float(), getattr(rotary, f"{kind}_attention_scaling"))
        for kind in rotary.layer_types
    }


def sandwich_norms(config: PretrainedConfig, layer_type: str) -> LayerNorms:
    """Return the names of a layer's norms: those of LFM2, and two after the blocks where there are such."""
    after = ("post_operator_norm", "post_ffn_norm") if config.use_sandwich_norm else (None, None)
    return replace(LFM2_NORMS, after_mixer=after[0], after_feed_forward=after[1])


class Lfm3Checkpoint(Checkpoint):
    """Files call the gate's projection `gate_proj`: transformers 5.24 renames it as it loads and as it saves."""

    RENAMED: ClassVar[Mapping[str, str]] = {".self_attn.g_proj.": ".self_attn.gate_proj."}


def check_window(config: Mapping[str, Any]) -> None:
    """Raise `Lfm2Error` for sliding attention without the width of its window."""
    window = config.get("sliding_window")
    if SLIDING_ATTENTION in (config.get("layer_types") or ()) and (not isinstance(window, int) or window < 1):
        raise Lfm2Error(
            f"sliding_window in config.json is {window}, and layer_types names {SLIDING_ATTENTION}. "
            "Give the number of tokens that such a layer sees."
        )


def check(config: Mapping[str, Any]) -> None:
    """Raise `Lfm2Error` for a configuration whose windows or ropes cannot be."""
    check_window(config)
    for field, rope in ropes(config):
        rope_type = rope.get("rope_type", rope.get("type", DEFAULT))
        turned = rope.get(PARTIAL, config.get(PARTIAL, 1))
        if turned < 1 and rope_type not in (DEFAULT, PROPORTIONAL):
            raise Lfm2Error(
                f"{field} in config.json has {PARTIAL} {turned} beside {rope_type}, which transformers' LFM3 does not "
                f"compute. A part of a head is turned by {PROPORTIONAL}."
            )


def mend_ropes(config: PretrainedConfig) -> list[str]:
    """Read the label "default" beside a `partial_rotary_factor` below 1 as "proportional", in place.

    Published checkpoints were trained with the frequencies of "proportional", and call them "default". transformers
    5.23 and 5.24 ignore the factor there, and turn the whole head.

    Returns:
        A sentence on each rope that was read so.
    """
    said = []
    for kind, rope in (getattr(config, "rope_parameters", None) or {}).items():
        turned = rope.get(PARTIAL, 1) if isinstance(rope, Mapping) else 1
        if turned < 1 and rope.get("rope_type") == DEFAULT:
            rope["rope_type"] = PROPORTIONAL
            said.append(
                f'rope_parameters.{kind} in config.json says "{DEFAULT}" with {PARTIAL} {turned}. That is read as '
                f'"{PROPORTIONAL}", as LFM3 was trained. transformers {transformers.__version__} turns whole heads '
                f"there: for a model that was trained so, write {PARTIAL} 1.0 into config.json."
            )
    return said


def whole_text(config: PretrainedConfig) -> LayerKind | None:
    """Return full attention where the window is as long as a text can be, else None."""
    return FULL if config.sliding_window >= config.max_position_embeddings else None


def prepare_masked(call: Call, config: PretrainedConfig, rotary: Rotary | None) -> AttentionCall:
    """Compute what all layers of sliding attention share in a call, with caches that keep all columns."""
    return masked_attention_call(call, rotary, config.sliding_window)


FULL = replace(lfm2.LAYER_KINDS[lfm2.FULL_ATTENTION], mixer=gated_attention)
SLIDING = LayerKind(gated_attention, FULL.module, window_state, prepare_sliding, instead=whole_text)
SLIDING_OVER_ALL_KEYS = replace(FULL, prepare=prepare_masked)
LAYER_KINDS = {lfm2.CONV: lfm2.LAYER_KINDS[lfm2.CONV], lfm2.FULL_ATTENTION: FULL, SLIDING_ATTENTION: SLIDING}

FIELDS = {
    "sliding_window": Field(int, 1, 2**22, optional=True),
    "use_sandwich_norm": FLAG,
    "use_attention_gate": FLAG,
    "attention_bias": FLAG,
    "attention_dropout": Field(float, 0, 1),
    "partial_rotary_factor": Field(float, 1e-3, 1),
}


MEMBER = Member(
    model_type="lfm3",
    architectures={"Lfm3ForCausalLM": "text-generation", "Lfm3Model": "feature-extraction"},
    min_transformers="5.23.0",
    layer_kinds=LAYER_KINDS,
    feed_forwards=lfm2.dense,
    rotary=rotary_by_kind,
    checkpoint=Lfm3Checkpoint,
    # In 4 bits these cause five sixths of the quantisation error (docs/lfm3.md).
    in_8_bits=("conv.in_proj", "conv.out_proj"),
    fields=FIELDS,
    check=check,
    own_code=published(*PUBLISHED_CODE),
    mend=mend_ropes,
    norms=sandwich_norms,
    title="LFM3",
)
MEMBER = replace(
    MEMBER,
    growing=replace(MEMBER, layer_kinds=LAYER_KINDS | {SLIDING_ATTENTION: SLIDING_OVER_ALL_KEYS}, genai_type="lfm2"),
)
