"""What a published folder is like, by what its model does: it predicts tokens, it sees, or it encodes texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from optimum_lfm2.caches import CACHE_NAMES
from optimum_lfm2.graph.member import Member
from optimum_lfm2.publish.encoder_card import encoder_values
from optimum_lfm2.publish.precisions import Published
from optimum_lfm2.publish.vision_card import vision_values
from optimum_lfm2.quality.evaluate import Quality, measure
from optimum_lfm2.quality.scoring import load, reference_model
from optimum_lfm2.quality.similarity import Similarity, compare_encoders, load_encoder, reference_encoder


Comparison = Callable[[Path, list[torch.Tensor]], Quality | Similarity]


def compares_predictions(model: Any) -> Comparison:
    """Return what compares a file with a float32 model of `Lfm2TasksManager` by the tokens that both predict."""
    gold = reference_model(model)
    return lambda path, text: measure(load(path), gold, text)


def compares_vectors(model: Any) -> Comparison:
    """Return what compares a file with a float32 model of `Lfm2TasksManager` by the vectors that both give."""
    gold = reference_encoder(model)
    return lambda path, text: compare_encoders(load_encoder(path), gold, text)


@dataclass(frozen=True)
class Kind:
    """A kind of published folder.

    Attributes:
        template: the file of its card's template.
        values: takes the folder, its files, the one that examples load, and the task; returns what the template asks
            for besides the values of every card.
        comparison: makes what compares a file with the checkpoint.
        order: the precisions in the order in which clients prefer them.
        measured: precisions that are kept only if a text shows that their vectors stay near the checkpoint's.
        cache_names: the conventions that the caches may have.
        extras: what a user installs of this package.
    """

    template: str
    values: Callable[[Path, Sequence[Published], Published, str], dict[str, Any]]
    comparison: Callable[[Any], Comparison] = compares_predictions
    # By their speed on a CPU. The first one in the folder is the default of onnxruntime-genai and of the card's
    # examples. q4s is a little faster than q4, but it costs twice the quality, and Transformers.js does not know it.
    order: tuple[str, ...] = ("q4", "q4s", "q8", "fp32", "q4f16", "fp16")
    measured: frozenset[str] = frozenset()
    cache_names: tuple[str, ...] = CACHE_NAMES
    extras: str = "onnxruntime"

    def preferred(self, files: Sequence[Published]) -> Published:
        """Return the first of the files in the order of preference."""
        return min(files, key=lambda file: self.order.index(file.precision))


PREDICTS = Kind("decoder.md.jinja", lambda folder, files, chosen, task: {})
SEES = Kind(
    "vision.md.jinja", lambda folder, files, chosen, task: vision_values(files, chosen), extras="onnxruntime,vision"
)
ENCODES = Kind(
    "encoder.md.jinja",
    lambda folder, files, chosen, task: encoder_values(folder, task),
    compares_vectors,
    # Clients take the file that computes what the checkpoint computes, where there is one.
    order=("fp32", "q8", "q4", "q4s", "fp16", "q4f16"),
    measured=frozenset({"q4", "q4s", "q4f16"}),
    cache_names=CACHE_NAMES[:1],
)


def kind_of(member: Member) -> Kind:
    """Return the kind of folder that a member's exports make."""
    return ENCODES if member.encodes else SEES if member.in_parts else PREDICTS
