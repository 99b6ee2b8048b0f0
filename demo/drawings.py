"""A seeded generator of pictures of circles, squares and triangles.

A kind is a colour and a shape. Some pairs of kinds are held out: no picture of the training has both of a pair.
"""

from __future__ import annotations

import random
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

import numpy as np


COLOURS = {
    "red": (214, 44, 44),
    "green": (44, 158, 68),
    "blue": (42, 90, 214),
    "yellow": (240, 206, 44),
    "purple": (140, 60, 170),
    "black": (30, 30, 30),
}
SHAPES = ["circle", "square", "triangle"]
SQUARE = 32  # pixels: a picture is a grid of squares, each with one thing at most. A square is a picture token
SIZES = [(128, 128), (96, 128), (128, 96)]  # heights and widths in pixels
SIZE_WEIGHTS = [80, 10, 10]
HELD_OUT_PERCENT = 12
MOST = 3  # things in a picture

Kind = tuple[str, str]
KINDS: list[Kind] = [(colour, shape) for colour in COLOURS for shape in SHAPES]


@dataclass(frozen=True)
class Thing:
    """One shape: its colour by name and as it is drawn, its centre and its radius in pixels."""

    colour: str
    shape: str
    paint: tuple[int, int, int]
    x: float
    y: float
    radius: float

    @property
    def kind(self) -> Kind:
        return self.colour, self.shape


@dataclass(frozen=True)
class Picture:
    """Things on a plain background."""

    height: int
    width: int
    background: tuple[int, int, int]
    things: tuple[Thing, ...]

    @property
    def size(self) -> tuple[int, int]:
        return self.height, self.width

    @property
    def counts(self) -> Counter[Kind]:
        return Counter(thing.kind for thing in self.things)

    def pixels(self) -> np.ndarray:
        """Draw the picture, uint8 (height, width, 3). Edges are smooth."""
        canvas = np.empty((self.height, self.width, 3), np.float32)
        canvas[:] = self.background
        for thing in self.things:
            top, left = (max(0, int(middle - thing.radius) - 1) for middle in (thing.y, thing.x))
            part = canvas[top : int(thing.y + thing.radius) + 2, left : int(thing.x + thing.radius) + 2]
            ys, xs = np.ogrid[: part.shape[0], : part.shape[1]]
            outside = distance(thing.shape, xs + left + 0.5 - thing.x, ys + top + 0.5 - thing.y, thing.radius)
            part += np.clip(0.5 - outside, 0, 1)[:, :, None] * (np.float32(thing.paint) - part)
        return canvas.round().astype(np.uint8)


def distance(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Return how far points are outside a shape around (0, 0), in pixels. It is negative inside."""
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "square":
        return np.maximum(abs(x), abs(y)) - 0.85 * radius
    slope = 0.5 * radius  # an equilateral triangle that stands on a side
    return np.maximum(y - slope, 0.866 * abs(x) - 0.5 * y - slope)


def is_held_out(kinds: set[Kind]) -> bool:
    """Return whether two of the kinds are a pair that is held out."""
    names = sorted(" ".join(kind) for kind in kinds)
    return any(zlib.crc32(" and ".join(pair).encode()) % 100 < HELD_OUT_PERCENT for pair in combinations(names, 2))


def draw(rng: random.Random, size: tuple[int, int] | None = None) -> Picture:
    """Compose a picture of one to `MOST` things."""
    height, width = size or rng.choices(SIZES, SIZE_WEIGHTS)[0]
    kinds = rng.sample(KINDS, rng.choice([1, 2, 2, 2, 3]))
    several = rng.random() < 0.6
    counts = {kind: rng.choice([1, 2, 3]) if several else 1 for kind in kinds}
    while sum(counts.values()) > MOST:
        counts[rng.choice([kind for kind in kinds if counts[kind] > 1])] -= 1
    light = rng.choice([255, 255, 255, rng.randint(225, 255)])
    squares = [(row, column) for row in range(height // SQUARE) for column in range(width // SQUARE)]
    things = []
    each = [kind for kind in kinds for _ in range(counts[kind])]
    for (colour, shape), (row, column) in zip(each, rng.sample(squares, len(each)), strict=True):
        paint = tuple(min(255, max(0, level + rng.randint(-18, 18))) for level in COLOURS[colour])
        x, y = ((place + 0.5) * SQUARE + rng.uniform(-4, 4) for place in (column, row))
        things.append(Thing(colour, shape, paint, x, y, rng.uniform(9, 12)))
    return Picture(height, width, (light,) * 3, tuple(things))


def drawings(seed: int, held_out: bool = False) -> Iterator[tuple[Picture, random.Random]]:
    """Yield pictures without end, each with the generator that goes on to ask about it.

    With `held_out` each picture has a pair of kinds that no picture has without.
    """
    rng = random.Random(seed)
    while True:
        picture = draw(rng)
        if is_held_out(set(picture.counts)) == held_out:
            yield picture, rng
