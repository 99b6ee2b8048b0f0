"""Refuse folders and arguments that a model with pictures cannot use, before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.utils import CONFIG_NAME

from optimum_lfm2.errors import Lfm2Error, read_object
from optimum_lfm2.families import MODEL_TYPES, member_of
from optimum_lfm2.loading.config_check import check_fields, loaded_config


PICTURE = ("pixel_values", "pixel_attention_mask", "spatial_shapes")


def check_type(model_type: str | None, where: object) -> None:
    """Raise `Lfm2Error` for a type of models that take no pictures."""
    if model_type not in MODEL_TYPES:
        raise Lfm2Error(
            f"{where} is of the type {model_type}, and this class loads LFM2-VL. Use the class of its type."
        )
    member_of({"model_type": model_type}).check_loader("ORTLfm2VlForConditionalGeneration", where)


def check_folder(folder: Path, subfolder: str = "") -> None:
    """Refuse a local folder before Optimum and transformers trip over it.

    Raises:
        Lfm2Error: it is of another model, or its config.json is missing or wrong.
    """
    places = dict.fromkeys((folder / subfolder, folder))
    path = next((file for place in places if (file := place / CONFIG_NAME).is_file()), None)
    if path is None:
        raise Lfm2Error(
            f"{folder} has no {CONFIG_NAME}. Give the whole exported folder, or copy the checkpoint's there."
        )
    written = read_object(path)
    check_type(written.get("model_type"), folder)
    check_fields(written, str(path))
    check_fields({"model_type": "lfm2", **(written.get("text_config") or {})}, f"the text_config of {path}")
    loaded_config(path.parent)


def check_pictures(pixels: Any, shapes: Any, mask: Any, config: PretrainedConfig) -> None:
    """Check what a processor returns for pictures.

    Args:
        pixels, shapes, mask: `pixel_values`, `spatial_shapes` and `pixel_attention_mask`.
        config: the configuration of the vision tower.

    Raises:
        Lfm2Error: one of them is missing, or they do not fit each other or the model.
    """
    given = dict(zip(PICTURE, (pixels, mask, shapes), strict=True))
    if missing := [name for name, value in given.items() if not isinstance(value, torch.Tensor)]:
        raise Lfm2Error(
            f"{missing[0]} is missing, or no tensor. The processor returns it beside the other values of a picture. "
            'Pass all that it returns: generate(**processor(..., return_tensors="pt")).'
        )
    width = config.num_channels * config.patch_size**2
    tiles, patches = pixels.shape[:2]
    fits = pixels.dim() == 3 and pixels.shape[2] == width
    if not fits or tuple(mask.shape) != (tiles, patches) or tuple(shapes.shape) != (tiles, 2):
        raise Lfm2Error(
            f"pixel_values {tuple(pixels.shape)}, pixel_attention_mask {tuple(mask.shape)} and spatial_shapes "
            f"{tuple(shapes.shape)} do not fit: give (tiles, patches, {width}), (tiles, patches) and (tiles, 2)."
        )
    if not pixels.is_floating_point():
        raise Lfm2Error(f"pixel_values is {pixels.dtype}; it has to be float, as the processor returns it.")
    if bool((shapes < 1).any()) or int(shapes.prod(1).max()) > patches:
        raise Lfm2Error(f"spatial_shapes {shapes.tolist()} asks for more patches than pixel_values has, or none.")
