"""The encoders made of LFM2: LFM2.5-Embedding, -ColBERT, -Encoder, and classifiers on them.

Their model type is `lfm2`, as for the dense decoder. The name of their class tells them apart. The reference is
`bidirectional.py`. A checkpoint's own code runs only where the user trusts it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from transformers import PretrainedConfig

from optimum_lfm2.caches import Kept
from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.families import lfm2
from optimum_lfm2.families.bidirectional import MODELS
from optimum_lfm2.fields import Field
from optimum_lfm2.graph.blocks import attention
from optimum_lfm2.graph.encoder import HEADS, both_ways_call, centred_call, centred_conv
from optimum_lfm2.graph.member import Member
from optimum_lfm2.weights.checkpoint import Checkpoint


# Checkpoints spell the class in several ways: Lfm2BidirectionalModel, Lfm2BidirP2ForTokenClassification.
CLASS = re.compile(r"Lfm2Bidir(?:ectional)?(?:P\d+)?(?P<head>Model|For\w+)")


def spelled(name: str) -> str | None:
    """Return how `architectures` spells a class; None for a class of another member."""
    match = CLASS.fullmatch(name)
    return f"Lfm2Bidirectional{match['head']}" if match else None


def nothing_kept(config: PretrainedConfig) -> tuple[Kept, ...]:
    return ()


class EncoderCheckpoint(Checkpoint):
    """A checkpoint of an encoder. Names begin with `lfm2.` under a head, and with `model.` or nothing without one."""

    PREFIXES: ClassVar[tuple[str, ...]] = ("lfm2.", "model.")


def check_labels(config: Mapping[str, Any]) -> None:
    """Raise `Lfm2Error` for a classifier whose labels cannot be counted."""
    labels = config.get("id2label")
    if labels is not None and sorted(map(str, labels)) != sorted(map(str, range(len(labels)))):
        raise Lfm2Error(
            f"id2label in config.json names the labels {', '.join(map(str, labels))[:60]}; they have to be "
            f"0 to {len(labels) - 1}. Correct it, or copy the file again."
        )


FIELDS = {"id2label": Field(dict, optional=True), "num_labels": Field(int, 1, 2**20, optional=True)}

FULL = lfm2.LAYER_KINDS[lfm2.FULL_ATTENTION]
LAYER_KINDS = {
    lfm2.CONV: replace(lfm2.LAYER_KINDS[lfm2.CONV], mixer=centred_conv, caches=nothing_kept, prepare=centred_call),
    lfm2.FULL_ATTENTION: replace(FULL, mixer=attention, caches=nothing_kept, prepare=both_ways_call),
}


MEMBER = Member(
    model_type="lfm2",
    architectures={spelled(model.__name__) or model.__name__: task for task, model in MODELS.items()},
    spelled=spelled,
    models={task: model._from_config for task, model in MODELS.items()},
    heads=HEADS,
    export_type="lfm2_encoder",
    own_code=lambda name: True,
    min_transformers="4.54.0",
    layer_kinds=LAYER_KINDS,
    feed_forwards=lfm2.dense,
    rotary=lfm2.rotary_of("rotary_emb"),
    checkpoint=EncoderCheckpoint,
    fields=FIELDS,
    check=check_labels,
)
