"""LFM2-VL: a vision tower whose features take the places of picture tokens in an LFM2 decoder.

The reference is transformers' `modeling_lfm2_vl.py`. The tower is in `graph/siglip2.py`.
"""

from __future__ import annotations

from dataclasses import replace

from optimum_lfm2 import compat
from optimum_lfm2.families import lfm2
from optimum_lfm2.fields import FLAG, SIZE, Field
from optimum_lfm2.graph.member import published
from optimum_lfm2.graph.siglip2 import TOWER
from optimum_lfm2.graph.vision_ops import ACTIVATIONS
from optimum_lfm2.weights.checkpoint import Checkpoint


# What `auto_map` names in checkpoints from before transformers had the model. transformers has the same.
PUBLISHED_CODE = (
    "configuration_lfm2_vl.Lfm2VlConfig",
    "modeling_lfm2_vl.Lfm2VlModel",
    "modeling_lfm2_vl.Lfm2VlForConditionalGeneration",
    "processing_lfm2_vl.Lfm2VlProcessor",
)

FIELDS = {
    "text_config": Field(dict),
    "vision_config": Field(dict),
    "image_token_id": Field(int, 0, 2**31 - 1),
    "projector_hidden_act": Field(str, values=tuple(ACTIVATIONS)),
    "projector_hidden_size": SIZE,
    "projector_bias": FLAG,
    "projector_use_layernorm": FLAG,
    "downsample_factor": Field(int, 1, 16),
}


class VlCheckpoint(Checkpoint):
    """Files of transformers 4 have a level `vision_model` in the tower's names, and those of 5 have not.

    Each release of transformers has its own files' names in its model too. transformers 4.57 leaves the tower of a file
    of 5 at random values; here both are read.
    """

    def _stored_name(self, name: str) -> str:
        short = name.replace(".vision_tower.vision_model.", ".vision_tower.")
        for candidate in (short, short.replace(".vision_tower.", ".vision_tower.vision_model.")):
            if candidate in self._files:
                return candidate
        return super()._stored_name(name)


MEMBER = replace(
    lfm2.MEMBER,
    model_type="lfm2_vl",
    title="LFM2-VL",
    other_spellings=("lfm2-vl",),  # as transformers 4.57 writes it
    architectures={"Lfm2VlForConditionalGeneration": "image-text-to-text"},
    models={"image-text-to-text": compat.vl_model},
    min_transformers="4.57.0",
    loader="ORTLfm2VlForConditionalGeneration",
    text="text_config",
    tower=TOWER,
    fields=FIELDS,
    check=TOWER.check_config,
    checkpoint=VlCheckpoint,
    own_code=published(*PUBLISHED_CODE),
    genai_type="lfm2_vl",
)
