"""Check the files of LFM2-VL that are no decoder: the vision encoder and the embedding, each as a whole."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from optimum_lfm2 import compat
from optimum_lfm2.loading.models import materialize_buffers
from optimum_lfm2.validation.decoder import judge, relative_error
from optimum_lfm2.validation.export_config import ExportConfig
from optimum_lfm2.validation.pieces import open_session, outputs_of
from optimum_lfm2.validation.streamed import Loan, StandIns
from optimum_lfm2.weights.blocks import rounded


IDS = 64  # how many tokens' embeddings are compared


def validate_vision(config: ExportConfig, model: Any, path: Path, atol: float) -> dict[str, float]:
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
    tower = config.member.tower
    pictures = tower.sample(model.config, tower.sizes(model.config))
    gold = {"image_features": vision_reference(config, model, pictures)}
    return _compared(path, pictures, gold, atol)


@torch.no_grad()
def vision_reference(config: ExportConfig, model: Any, pictures: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return transformers' features in float32, (picture tokens, hidden_size), with the weights of the file."""
    weights = StandIns(model, config.weights, config.scheme)
    inner = model.model
    with ExitStack() as stack:
        for name in config.member.tower.modules:
            materialize_buffers(getattr(inner, name))
            loan = Loan(getattr(inner, name), f"model.{name}", weights)
            stack.callback(loan.give_back)
            loan.take()
        features = [compat.picture_features(inner, one).float() for one in config.member.tower.alone(pictures)]
    return torch.cat(features)


def validate_embedding(config: ExportConfig, model: Any, path: Path, atol: float) -> dict[str, float]:
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
