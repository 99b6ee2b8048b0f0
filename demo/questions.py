"""Questions about a picture of `drawings.py`, each with its short answer."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

from drawings import COLOURS, SHAPES, Kind, Picture, Thing


Turn = tuple[str, str]
NUMBERS = ["None", "One", "Two", "Three"]
CLEAR = 16  # pixels: what is nearer to a thing's row or column is neither above nor below, neither left nor right


def listed(counts: Counter[Kind]) -> str:
    """Return what a picture has in words, in the order of the tables above."""
    order = sorted(counts, key=lambda kind: (SHAPES.index(kind[1]), list(COLOURS).index(kind[0])))
    parts = [f"{NUMBERS[counts[kind]].lower()} {' '.join(kind)}{'s' * (counts[kind] > 1)}" for kind in order]
    return ", ".join(parts[:-1]) + " and " + parts[-1] if len(parts) > 1 else parts[0]


def one(rng: random.Random, picture: Picture, of: str = "kind") -> Thing | None:
    """Pick a thing that is the only one of its kind, its shape or its colour."""
    counts = Counter(getattr(thing, of) for thing in picture.things)
    things = [thing for thing in picture.things if counts[getattr(thing, of)] == 1]
    return rng.choice(things) if things else None


def any_kind(rng: random.Random, picture: Picture) -> Kind:
    """Pick a kind: one of the picture, or one that has something of it, or any."""
    kinds = list(picture.counts)
    if rng.random() < 0.6:
        return rng.choice(kinds)
    colour, shape = rng.choice(kinds)
    return rng.choice([(colour, rng.choice(SHAPES)), (rng.choice(list(COLOURS)), shape)])


def describe(rng: random.Random, picture: Picture) -> Turn | None:
    text = listed(picture.counts)
    return "Describe the picture.", f"{text[0].upper()}{text[1:]}."


def how_many(rng: random.Random, picture: Picture) -> Turn | None:
    kind = any_kind(rng, picture)
    return f"How many {' '.join(kind)}s are there?", f"{NUMBERS[picture.counts[kind]]}."


def how_many_of_shape(rng: random.Random, picture: Picture) -> Turn | None:
    shape = rng.choice([thing.shape for thing in picture.things] + SHAPES[:1])
    return f"How many {shape}s are there?", f"{NUMBERS[sum(thing.shape == shape for thing in picture.things)]}."


def what_colour(rng: random.Random, picture: Picture) -> Turn | None:
    thing = one(rng, picture, "shape")
    return thing and (f"What colour is the {thing.shape}?", f"{thing.colour.capitalize()}.")


def what_shape(rng: random.Random, picture: Picture) -> Turn | None:
    thing = one(rng, picture, "colour")
    return thing and (f"What shape is {thing.colour}?", f"A {thing.shape}.")


def is_there(rng: random.Random, picture: Picture) -> Turn | None:
    kind = any_kind(rng, picture)
    return f"Is there a {' '.join(kind)}?", "Yes." if picture.counts[kind] else "No."


def where_is(rng: random.Random, picture: Picture) -> Turn | None:
    thing = one(rng, picture)
    if thing is None:
        return None
    x, y = thing.x - picture.width / 2, thing.y - picture.height / 2
    if min(abs(x), abs(y)) < CLEAR / 2:
        return None
    side = f"{'top' if y < 0 else 'bottom'} {'left' if x < 0 else 'right'}"
    return f"Where is the {' '.join(thing.kind)}?", f"At the {side}."


def what_is_beside(rng: random.Random, picture: Picture) -> Turn | None:
    thing = one(rng, picture)
    if thing is None or len(picture.things) == 1:
        return None
    side = rng.choice(["left of", "right of", "above", "below"])
    steps = [other.x - thing.x if side.endswith("of") else other.y - thing.y for other in picture.things]
    if side in ("left of", "above"):
        steps = [-step for step in steps]
    found = {other.kind for other, step in zip(picture.things, steps, strict=True) if step > CLEAR}
    if len(found) > 1 or (not found and rng.random() < 0.6):
        return None
    answer = f"A {' '.join(found.pop())}." if found else "Nothing."
    return f"What is {side} the {' '.join(thing.kind)}?", answer


QUESTIONS: dict[Callable[[random.Random, Picture], Turn | None], int] = {
    describe: 2, how_many: 4, how_many_of_shape: 2, what_colour: 3, what_shape: 2, is_there: 2, where_is: 3,
    what_is_beside: 5,
}  # fmt: skip


def questions(rng: random.Random, picture: Picture, count: int) -> list[Turn]:
    """Make some questions about a picture, each with its answer. No question comes twice."""
    turns: dict[str, str] = {}
    for make in rng.choices(list(QUESTIONS), list(QUESTIONS.values()), k=4 * count):
        turn = make(rng, picture)
        if turn is not None and len(turns) < count:
            turns.setdefault(*turn)
    return list(turns.items())
