"""A loss in words."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from optimum_lfm2.quality.evaluate import Quality
from optimum_lfm2.quality.similarity import Similarity


QUALITY = Quality(1.0, 1.0, 0.0, 0.0, 1.0, 2, 10)
SIMILARITY = Similarity(1.0, 1.0, None, 2, 10)


@pytest.mark.parametrize(
    ("divergence", "loss"),
    [
        (0.0, "none that shows"),
        (1e-4, "next to none"),
        (0.0021, "slight"),
        (0.05, "noticeable"),
        (0.1, "heavy"),
        (math.nan, "heavy"),
    ],
)
def test_of_a_divergence(divergence, loss):
    quality = replace(QUALITY, kl_divergence=divergence)
    assert quality.loss == quality.cells()["loss"] == loss
    assert quality.summary().startswith(f"{loss} (KL divergence")
    assert loss in quality.table()


@pytest.mark.parametrize(
    ("cosine", "loss"),
    [(1.0, "none that shows"), (0.9995, "next to none"), (0.995, "slight"), (0.95, "noticeable"), (0.5, "heavy")],
)
def test_of_a_cosine(cosine, loss):
    assert replace(SIMILARITY, cosine=cosine).loss == loss


def test_the_card_says_what_the_words_mean():
    said = (
        "none that shows below 0.00001, next to none below 0.001, slight below 0.01, noticeable below 0.1, else heavy."
    )
    assert QUALITY.measured("text").endswith(said)
    assert "noticeable above 0.9, else heavy." in SIMILARITY.measured("text")
