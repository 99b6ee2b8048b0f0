"""The type of the record that describes a vision tower. A tower has a file with its graph and its record."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig

from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.fields import Field
from optimum_lfm2.graph.member import Weight


Pictures = Mapping[str, torch.Tensor]


# What every image processor may hold, beside its own settings.
PIXELS = {
    "resample": Field(int, 0, 5),
    "rescale_factor": Field(float, 0, 1),
    "image_mean": Field(float, -1e3, 1e3, listed=True),
    "image_std": Field(float, 1e-6, 1e3, listed=True),
}


@dataclass(frozen=True)
class ProcessorSettings:
    """What a tower's image processor has to say.

    Attributes:
        defaults: transformers' defaults, which other runtimes do not know.
        fields: what a setting may hold.
        shared: for each setting that the model's configuration has too, what reads it there.
        written: settings that are written whatever the checkpoint says, for runtimes other than transformers.
        apart: whether transformers cannot read those. Then the checkpoint's own settings stand within those of the
            whole processor too, where transformers looks first.
    """

    defaults: Mapping[str, Any]
    fields: Mapping[str, Field]
    shared: Mapping[str, Callable[[PretrainedConfig], Any]]
    written: Mapping[str, Any]
    apart: bool = False


@dataclass(frozen=True)
class Medium:
    """What takes places in a text: pictures or videos.

    Attributes:
        name: what messages call one.
        token: the field of config.json that has the id of such places.
        arguments: the names, in a call of the model, of what becomes the inputs of the tower's graph, in their order.
    """

    name: str
    token: str
    arguments: tuple[str, ...]

    def given(self, arguments: Mapping[str, Any]) -> list[Any]:
        """Return the arguments of this medium among those of a call, None for each that is not there."""
        return [arguments.get(name) for name in self.arguments]


@dataclass(frozen=True)
class Tower:
    """A vision tower with its projector. It makes features of pictures, which take the places of picture tokens.

    Each function takes the configuration of the whole model.

    Attributes:
        inputs: the shape of each input of the graph by its name, in order. A symbol stands for an axis that varies. The
            first input is float32, the others are int64.
        features: the graph. It takes the inputs in order, what gives a parameter by its name, the names of the model's
            parameters, the configuration, and the dtype of hidden states. It returns float32 (picture tokens,
            hidden_size of the decoder), the pictures one after the other.
        modules: the modules of transformers' `model.model` that compute the same.
        media: what a call shows. Features of the first come first.
        sizes: sizes of pictures in picture tokens, for validation: one token, tall, wide, large.
        sample: makes pictures of random pixels of such sizes, as a processor gives them.
        alone: takes pictures, and yields each by itself and without padding.
        pieces: the same for generation: parts whose features do not depend on each other, so that memory does not grow
            with their number.
        check_call: takes what a call shows of a medium, tensors by the names of its arguments, and raises `Lfm2Error`
            where they do not fit each other or the model.
        fields: what a field of `vision_config` may hold.
        check: raises `Lfm2Error` for a `vision_config`, as a mapping, for which the graph would be wrong.
        processor: the settings of its image processor.
    """

    inputs: Callable[[PretrainedConfig], dict[str, tuple[int | str, ...]]]
    features: Callable[[Sequence[torch.Tensor], Weight, Iterable[str], PretrainedConfig, torch.dtype], torch.Tensor]
    modules: tuple[str, ...]
    media: tuple[Medium, ...]
    sizes: Callable[[PretrainedConfig], list[tuple[int, int]]]
    sample: Callable[[PretrainedConfig, Sequence[tuple[int, int]]], dict[str, torch.Tensor]]
    alone: Callable[[Pictures], Iterable[dict[str, torch.Tensor]]]
    pieces: Callable[[Pictures], Iterable[dict[str, torch.Tensor]]]
    check_call: Callable[[Pictures, PretrainedConfig], None]
    fields: Mapping[str, Field]
    check: Callable[[Mapping[str, Any]], None]
    processor: ProcessorSettings

    def check_config(self, config: Mapping[str, Any]) -> None:
        """Raise `Lfm2Error` for a config.json, as a mapping, whose tower this one is not."""
        tower = config.get("vision_config") or {}
        for field, rule in self.fields.items():
            if field in tower and not rule.takes(tower[field]):
                raise Lfm2Error(
                    f"{field} in the vision_config of config.json is {tower[field]!r}; it has to be {rule}. "
                    "Correct it, or copy the file again."
                )
        self.check(tower)
