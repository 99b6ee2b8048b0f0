"""Check the files of LFM2-VL that are no decoder: the vision encoder and the embedding, each as a whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from optimum_lfm2 import compat
from optimum_lfm2.validation.decoder import judge, relative_error
from optimum_lfm2.validation.pieces import open_session, outputs_of
from optimum_lfm2.validation.streamed import Loan, StandIns
from optimum_lfm2.weights.blocks import rounded


IDS = 64  # how many tokens' embeddings are compared


def sample_pictures(config: PretrainedConfig, blocks: Sequence[tuple[int, int]]) -> dict[str, torch.Tensor]:
    """Return pictures of random pixels as a processor gives them, padded to the longest.

    Args:
        config: the configuration of a whole model.
        blocks: the height and width of each picture in picture tokens.
    """
    vision, factor = config.vision_config, config.downsample_factor
    shapes = torch.tensor(blocks) * factor
    counts = shapes.prod(1)
    generator = torch.Generator().manual_seed(0)
    width = vision.num_channels * vision.patch_size**2
    mask = (torch.arange(int(counts.max()) + 3)[None] < counts[:, None]).to(torch.int64)
    pixels = torch.rand(*mask.shape, width, generator=generator) * 2 - 1
    return {
        "pixel_values": pixels * mask[..., None],
        "pixel_attention_mask": mask,
        "spatial_shapes": shapes,
    }


def sizes(config: PretrainedConfig) -> list[tuple[int, int]]:
    """Return sizes in picture tokens: one, tall, wide, as large as the table of positions, and larger than that."""
    side = max(1, int(config.vision_config.num_patches**0.5) // config.downsample_factor)
    return [(1, 1), (side, 1), (1, side + 1), (side, side), (side + 1, side // 2 + 1)]


def validate_vision(config: Any, model: Any, path: Path, atol: float) -> dict[str, float]:
    """Compare a vision encoder with transformers, which gets each picture alone and without padding.

    Args:
        config: the `OnnxConfig` of the file. It has the weights.
        model: transformers' whole model. Its own weights are not read.
        path: the exported file.
        atol: the largest `relative_error` of a picture token.

    Returns:
        The relative error, by the output's name.

    Raises:
        Lfm2Error: the file differs, or cannot be compared.
    """
    pictures = sample_pictures(model.config, sizes(model.config))
    gold = {"image_features": vision_reference(config, model, pictures)}
    return _compared(path, pictures, gold, atol)


@torch.no_grad()
def vision_reference(config: Any, model: Any, pictures: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return transformers' features in float32, (picture tokens, hidden_size), with the weights of the file."""
    weights = StandIns(model, config.weights, config.scheme)
    inner = model.model
    with ExitStack() as stack:
        for name in ("vision_tower", "multi_modal_projector"):
            loan = Loan(getattr(inner, name), f"model.{name}", weights)
            stack.callback(loan.give_back)
            loan.take()
        features = []
        for i, count in enumerate(pictures["spatial_shapes"].prod(1).tolist()):
            alone = {name: values[i : i + 1] for name, values in pictures.items()}
            alone |= {name: alone[name][:, :count] for name in ("pixel_values", "pixel_attention_mask")}
            features.append(compat.picture_features(inner, alone).float())
    return torch.cat(features)


def validate_embedding(config: Any, model: Any, path: Path, atol: float) -> dict[str, float]:
    """Compare an embedding with the checkpoint's rows. Arguments and errors are those of `validate_vision`."""
    name = "model.embed_tokens.weight"
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (2, IDS), generator=generator)
    scheme = config.scheme
    blocks = None if scheme is None or scheme.embedding == "float" else scheme.table
    rows = rounded(config.weights[name].detach()[ids.flatten()], blocks).float().reshape(*ids.shape, -1)
    return _compared(path, {"input_ids": ids}, {"inputs_embeds": rows}, atol)


def _compared(
    path: Path, feeds: Mapping[str, torch.Tensor], gold: dict[str, torch.Tensor], atol: float
) -> dict[str, float]:
    session = open_session(path, path.parent, prepack=False)
    own = outputs_of(session, {name: values.numpy() for name, values in feeds.items()}, gold)
    differences = {}
    for name, values in gold.items():
        tokens, axis = values.reshape(1, -1, values.shape[-1]), 1
        difference = own[name].reshape(tokens.shape) - tokens
        differences[name] = relative_error(difference, tokens, torch.zeros_like(tokens), axis)
    judge(differences, atol)
    return differences
