"""A measured loss of quality in words."""

from __future__ import annotations

from collections.abc import Sequence


# Each word with the loss below which it is said. The steps between them are factors of ten.
LOSSES = ("none that shows", "next to none", "slight", "noticeable")
HEAVY = "heavy"


def loss_in_words(loss: float, bounds: Sequence[float]) -> str:
    """Return a loss in words.

    Args:
        loss: the loss, 0 for none. A loss that is not a number is heavy.
        bounds: for each of `LOSSES` the loss below which it is said.
    """
    return next((word for word, bound in zip(LOSSES, bounds, strict=True) if loss < bound), HEAVY)


def legend(bounds: Sequence[float], figure: str, above: bool = False) -> str:
    """Return what the words mean, as a sentence.

    Args:
        bounds: the bounds, as a reader sees them.
        figure: what the bounds are of.
        above: whether the figure is better where it is larger.
    """
    side = "above" if above else "below"
    said = ", ".join(f"{word} {side} {f'{bound:f}'.rstrip('0')}" for word, bound in zip(LOSSES, bounds, strict=True))
    return f"The loss is by the {figure}: {said}, else {HEAVY}."
