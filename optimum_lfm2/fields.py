"""What a field of a `config.json` may hold."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from optimum_lfm2.errors import Lfm2Error


@dataclass(frozen=True)
class Field:
    """The values that a field may have.

    Attributes:
        kind: `int`, `float` (which takes whole numbers too), `bool`, `str` or `dict`.
        least: the smallest number.
        most: the largest.
        optional: whether the value may be null, for which transformers takes its default.
        listed: whether the value may also be a list of such values.
        many: whether the value has to be a list.
        values: all allowed values of a string. Empty where any string will do.
    """

    kind: type
    least: float = -math.inf
    most: float = math.inf
    optional: bool = False
    listed: bool = False
    many: bool = False
    values: tuple[str, ...] = ()

    def takes(self, value: Any) -> bool:
        """Return whether the field may have a value, which is as JSON gives it."""
        if value is None:
            return self.optional
        if self.many or (self.listed and isinstance(value, list)):
            return isinstance(value, list) and all(self._takes_one(one) for one in value)
        return self._takes_one(value)

    def _takes_one(self, value: Any) -> bool:
        if isinstance(value, bool):
            return self.kind is bool
        if self.kind in (int, float):
            return isinstance(value, (int, self.kind)) and self.least <= value <= self.most
        return isinstance(value, self.kind) and (not self.values or value in self.values)

    def __str__(self) -> str:
        names = {int: "a whole number", float: "a number", bool: "true or false", str: "a string", dict: "an object"}
        text = " or ".join(self.values) or names[self.kind]
        if self.least > -math.inf:
            text += f" from {self.least:g}" + (f" to {self.most:.10g}" if self.most < math.inf else "")
        if self.many:
            return f"a list, each {text}"
        return text + " or a list of them" * self.listed + ", or null" * self.optional


SIZE = Field(int, 1, 2**20)
FLAG = Field(bool)
POSITIVE = Field(float, 1e-30, 1e30)
TOKEN = Field(int, -1, 2**31 - 1, optional=True)
NUMBER_TYPES = ("float32", "float16", "bfloat16", "float64")


def ropes(config: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the field and the parameters of each rope. There is one for all layers, or one for each kind of layer."""
    for field in ("rope_scaling", "rope_parameters"):
        rope = config.get(field) or {}
        by_kind = [value for value in rope.values() if isinstance(value, Mapping)]
        yield from ((field, value) for value in by_kind or [rope])


def contradiction(name: str, one: str, other: str) -> Lfm2Error:
    """Return the error for two fields of the file `name` that cannot both be right."""
    return Lfm2Error(f"{name} contradicts itself: {one}, but {other}. Correct it, or copy the file again.")
