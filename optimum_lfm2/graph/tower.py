"""The type of the record that describes a vision tower. A tower has one file with its graph and its record."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig

from optimum_lfm2.fields import Field
from optimum_lfm2.graph.member import Weight


Pictures = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class ProcessorSettings:
    """What a tower's image processor has to say.

    Attributes:
        defaults: transformers' defaults, which other runtimes do not know.
        fields: what a setting may hold.
        shared: for each setting that the model's configuration has too, what reads it there.
        written: settings that are written whatever the checkpoint says.
    """

    defaults: Mapping[str, Any]
    fields: Mapping[str, Field]
    shared: Mapping[str, Callable[[PretrainedConfig], Any]]
    written: Mapping[str, Any]


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
        sizes: sizes of pictures in picture tokens, for validation: one token, tall, wide, large.
        sample: makes pictures of random pixels of such sizes, as a processor gives them.
        alone: takes pictures, and yields each by itself and without padding.
        fields: what a field of `vision_config` may hold.
        check: raises `Lfm2Error` for a `vision_config`, as a mapping, for which the graph would be wrong.
        processor: the settings of its image processor.
    """

    inputs: Callable[[PretrainedConfig], dict[str, tuple[int | str, ...]]]
    features: Callable[[Sequence[torch.Tensor], Weight, Iterable[str], PretrainedConfig, torch.dtype], torch.Tensor]
    modules: tuple[str, ...]
    sizes: Callable[[PretrainedConfig], list[tuple[int, int]]]
    sample: Callable[[PretrainedConfig, Sequence[tuple[int, int]]], dict[str, torch.Tensor]]
    alone: Callable[[Pictures], Iterable[dict[str, torch.Tensor]]]
    fields: Mapping[str, Field]
    check: Callable[[Mapping[str, Any]], None]
    processor: ProcessorSettings
