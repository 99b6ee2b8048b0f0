"""Validation sees a graph that reads masked tokens or turns heads otherwise: each mutant is wrong in one place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import make_encoder
from optimum.exporters.onnx import main_export

from optimum_lfm2 import compat
from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.graph import call, encoder, ops
from optimum_lfm2.validation.decoder import errors_as_they_are
from optimum_lfm2.validation.pieces import with_noise


def export(source: Path, out: Path) -> None:
    with errors_as_they_are():
        main_export(str(source), out)


def _conv_without_where(monkeypatch) -> None:
    real = call.ConvCall
    monkeypatch.setattr(call, "ConvCall", lambda visible, **others: real(visible=visible == visible, **others))


def _centred_conv_without_where(monkeypatch) -> None:
    real = encoder.CentredCall
    monkeypatch.setattr(encoder, "CentredCall", lambda visible: real(visible == visible))


def _attention_that_sees_padding(monkeypatch) -> None:
    real = call.shapes.repeated
    monkeypatch.setattr(call.shapes, "repeated", lambda masked, like: real(masked * 0, like))


def _attention_that_sees_padding_a_little(monkeypatch) -> None:
    monkeypatch.setattr(ops, "MASKED", -3.0)


def _all_pairs_turn(monkeypatch) -> None:
    """What transformers reads of LFM3's published label."""
    real = ops.rotary_table

    def table(positions: torch.Tensor, inverse: torch.Tensor, *rest: object) -> object:
        return real(positions, torch.where(inverse == 0, inverse[1] ** 4, inverse), *rest)

    monkeypatch.setattr(ops, "rotary_table", table)


def _other_theta(monkeypatch) -> None:
    real = ops.rotary_table
    monkeypatch.setattr(ops, "rotary_table", lambda at, inverse, *rest: real(at, inverse**1.01, *rest))


def _pictures_see_padding(monkeypatch) -> None:
    monkeypatch.setattr(ops, "MASKED", 0.0)


@pytest.fixture(scope="module")
def source(checkpoint, made_once, vl_checkpoint) -> Callable[[str], Path]:
    def source(name: str) -> Path:
        if name == "encoder":
            return made_once("masked-encoder", lambda folder: make_encoder("encoder", folder)) / "encoder"
        if name == "vl":
            return vl_checkpoint
        if name.startswith("lfm3") and "lfm3" in compat.STAND_INS:
            pytest.skip("this transformers has no lfm3")
        return checkpoint(name)

    return source


@pytest.mark.parametrize(
    ("name", "mutant"),
    [
        ("hybrid", _conv_without_where),
        ("hybrid", _attention_that_sees_padding),
        ("hybrid", _attention_that_sees_padding_a_little),
        ("hybrid", _other_theta),
        ("encoder", _centred_conv_without_where),
        ("encoder", _attention_that_sees_padding),
        ("lfm3", _conv_without_where),
        ("lfm3", _attention_that_sees_padding),
        ("lfm3_rope", _all_pairs_turn),
        ("vl", _pictures_see_padding),
        ("vl", _conv_without_where),
    ],
)
def test_a_mutant_is_found(name, mutant, source, tmp_path, monkeypatch):
    mutant(monkeypatch)
    with pytest.raises(Lfm2Error, match="The file is wrong and was not kept"):
        export(source(name), tmp_path / "wrong")


@pytest.mark.parametrize("name", ["hybrid", "encoder", "lfm3", "vl"])
def test_the_right_graph_is_kept(name, source, tmp_path):
    export(source(name), tmp_path / "right")


def test_noise_is_of_the_size_of_the_values():
    values = torch.full((2, 3, 64), 5.0) * torch.tensor([1.0, -1.0]).repeat(32)
    values[0, 1] = torch.nan
    noisy = with_noise(values)
    assert noisy.isfinite().all()
    assert torch.equal(noisy[1], values[1])
    assert 3 < noisy[0, 1].std() < 8
