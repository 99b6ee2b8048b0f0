"""Refuse folders and arguments that a model with pictures cannot use, before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.utils import CONFIG_NAME

from optimum_lfm2.errors import Lfm2Error, read_object
from optimum_lfm2.families import MODEL_TYPES, member_of
from optimum_lfm2.graph.tower import Medium, Pictures, Tower
from optimum_lfm2.loading.config_check import check_fields, loaded_config


def check_type(model_type: str | None, name: str, where: object) -> None:
    """Raise `Lfm2Error` for a type of models that a class does not load.

    Args:
        model_type: as in config.json.
        name: the name of the class.
        where: the folder or id, for the message.
    """
    if model_type not in MODEL_TYPES:
        raise Lfm2Error(f"{where} is of the type {model_type}, which {name} does not load. Use the class of its type.")
    member_of({"model_type": model_type}).check_loader(name, where)


def check_folder(folder: Path, name: str, subfolder: str = "") -> None:
    """Refuse a local folder before Optimum and transformers trip over it.

    Args:
        folder: the folder.
        name: the name of the class that is to load it.
        subfolder: where its ONNX files are.

    Raises:
        Lfm2Error: it is of a model that the class does not load, or its config.json is missing or wrong.
    """
    places = dict.fromkeys((folder / subfolder, folder))
    path = next((file for place in places if (file := place / CONFIG_NAME).is_file()), None)
    if path is None:
        raise Lfm2Error(
            f"{folder} has no {CONFIG_NAME}. Give the whole exported folder, or copy the checkpoint's there."
        )
    written = read_object(path)
    check_type(written.get("model_type"), name, folder)
    check_fields(written, str(path))
    member = member_of(written)
    if member.text is not None:
        text = {"model_type": member.text_type, **(written.get(member.text) or {})}
        check_fields(text, f"the {member.text} of {path}")
    loaded_config(path.parent)


def check_shown(medium: Medium, given: Sequence[Any], tower: Tower, config: PretrainedConfig) -> Pictures:
    """Check what a processor returns for the pictures, or the videos, of a call.

    Args:
        medium: which of them.
        given: the values of its arguments, None for one that is not there.
        tower: the vision tower.
        config: the configuration of the whole model.

    Returns:
        The inputs of the tower's graph by their names.

    Raises:
        Lfm2Error: one of them is missing, or they do not fit each other or the model.
    """
    named = dict(zip(medium.arguments, given, strict=True))
    if missing := [name for name, value in named.items() if not isinstance(value, torch.Tensor)]:
        raise Lfm2Error(
            f"{missing[0]} is missing, or no tensor. The processor returns it beside the other values of a "
            f"{medium.name}. "
            'Pass all that it returns: generate(**processor(..., return_tensors="pt")).'
        )
    tower.check_call(named, config)
    name, pixels = next(iter(named.items()))
    if not pixels.is_floating_point():
        raise Lfm2Error(f"{name} is {pixels.dtype}; it has to be float, as the processor returns it.")
    return dict(zip(tower.inputs(config), named.values(), strict=True))


def unfilled(medium: Medium, places: int, features: int) -> str:
    """Return the message for a text whose places of a medium are not as many as its features."""
    return (
        f"input_ids has {places} {medium.name} tokens, and the {medium.name}s fill {features}. "
        f"Give the processor the text and all its {medium.name}s at once."
    )
