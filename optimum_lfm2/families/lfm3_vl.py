"""LFM3-VL: a vision tower whose features take the places of picture and video tokens in an LFM3 decoder.

The reference is transformers' `modeling_lfm3_vl.py`. The tower is in `graph/lfm3_vision.py`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from optimum_lfm2 import compat
from optimum_lfm2.families import lfm3
from optimum_lfm2.fields import FLAG, SIZE, Field
from optimum_lfm2.graph.lfm3_vision import TOWER
from optimum_lfm2.graph.member import published
from optimum_lfm2.graph.vision_ops import ACTIVATIONS


# What `auto_map` of published checkpoints names. transformers has the same.
PUBLISHED_CODE = (
    "configuration_lfm3_vl.Lfm3VlConfig",
    "modeling_lfm3_vl.Lfm3VlModel",
    "modeling_lfm3_vl.Lfm3VlForConditionalGeneration",
    "processing_lfm3_vl.Lfm3VlProcessor",
)

TOKEN = Field(int, 0, 2**31 - 1)
FIELDS = {
    "text_config": Field(dict),
    "vision_config": Field(dict),
    "image_token_id": TOKEN,
    "video_token_id": TOKEN,
    "projector_hidden_act": Field(str, values=tuple(ACTIVATIONS)),
    "projector_hidden_size": SIZE,
    "projector_bias": FLAG,
}


class Lfm3VlCheckpoint(lfm3.Lfm3Checkpoint):
    """Files have other names in the tower too: transformers 5.24 renames them as it loads and as it saves."""

    RENAMED: ClassVar = {
        **lfm3.Lfm3Checkpoint.RENAMED,
        ".vision_tower.patch_embed.": ".vision_tower.patchifier.",
        ".self_attn.q_norm.": ".self_attn.q_layernorm.",
        ".self_attn.k_norm.": ".self_attn.k_layernorm.",
    }


MEMBER = replace(
    lfm3.MEMBER,
    model_type="lfm3_vl",
    title="LFM3-VL",
    page="vision",
    architectures={"Lfm3VlForConditionalGeneration": "image-text-to-text"},
    models={"image-text-to-text": compat.vl_model},
    loader="ORTLfm3VlForConditionalGeneration",
    text="text_config",
    text_type=lfm3.MEMBER.model_type,
    tower=TOWER,
    fields=FIELDS,
    check=TOWER.check_config,
    checkpoint=Lfm3VlCheckpoint,
    own_code=published(*PUBLISHED_CODE),
    growing=None,  # the decoder is a member of its own, which has this choice
)
