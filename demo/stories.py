"""A seeded generator of short stories from the word lists and templates in ``grammar/``.

Choices follow a skewed distribution whose order depends on the hero of the story. So the next event is partly
predictable from the story so far, as in ordinary text.
"""

from __future__ import annotations

import random
import re
import zlib
from pathlib import Path


FOLDER = Path(__file__).resolve().parent
SLOT = re.compile(r"\{([^{}]+)\}")
FAMILIES = 8

Grammar = dict[str, list[str]]


def read_grammar(*paths: Path) -> Grammar:
    """Read ``[rule]`` sections. Each alternative has a line of its own, or `` | `` separates several on one line."""
    grammar: Grammar = {}
    rule = ""
    for path in paths:
        for line in path.read_text(encoding="utf-8").splitlines():
            if not line or line.startswith("#"):
                continue
            if line.startswith("["):
                rule = line.strip("[]")
                grammar[rule] = []
            else:
                grammar[rule] += [part.replace("\\n", "\n") for part in line.split(" | ")]
    return grammar


GRAMMAR = read_grammar(*sorted((FOLDER / "grammar").glob("*.txt")))
NAMES = GRAMMAR["girl"] + GRAMMAR["boy"]


def capitalise(text: str) -> str:
    return text[:1].upper() + text[1:]


def with_article(text: str) -> str:
    return ("an " if text[:1].lower() in "aeiou" else "a ") + text


def skewed_choice(rng: random.Random, options: list[str], key: str, skew: float = 1.4) -> str:
    """Pick one option. ``key`` decides the order of the options, and the first ones are picked much more often."""
    order = list(options)
    random.Random(zlib.crc32(key.encode())).shuffle(order)
    weights = [(rank + 1) ** -skew for rank in range(len(order))]
    return rng.choices(order, weights)[0]


class Storyteller:
    """Expands grammar rules for one hero and one friend."""

    def __init__(self, rng: random.Random, hero: str | None = None):
        self.rng = rng
        hero = hero or skewed_choice(rng, NAMES, "hero", 0.4)
        friend = skewed_choice(rng, [name for name in NAMES if name != hero], hero, 0.8)
        self.family = zlib.crc32(hero.encode()) % FAMILIES
        girl = hero in GRAMMAR["girl"]
        self.known = {
            "hero": hero,
            "friend": friend,
            "kid": "girl" if girl else "boy",
            "he": "she" if girl else "he",
            "him": "her" if girl else "him",
            "his": "her" if girl else "his",
            "their": "her" if friend in GRAMMAR["girl"] else "his",
        }

    def expand(self, rule: str) -> str:
        template = skewed_choice(self.rng, GRAMMAR[rule], f"{rule}/{self.family}")
        return SLOT.sub(lambda match: self.fill(match.group(1)), template)

    def fill(self, slot: str) -> str:
        capital = slot[0].isupper()
        slot = slot[0].lower() + slot[1:]
        article = slot.startswith("a ")
        name, _, rule = slot.removeprefix("a ").partition(":")
        if rule:
            self.known[name] = self.expand(rule)
        text = self.known.get(name) or self.expand(name)
        text = with_article(text) if article else text
        return capitalise(text) if capital else text


def story(rng: random.Random, hero: str | None = None) -> str:
    """Write one story."""
    return Storyteller(rng, hero).expand("story")
