"""The grammar of an answer that has to call a tool, as LFM2 writes calls: `[f(a=1), g(b="x")]` between two tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from optimum_lfm2.errors import Lfm2Error


NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(?:[-.][A-Za-z0-9_]+)*", re.ASCII)
SHARED = ("$defs", "definitions")  # where the parts of a schema that others refer to stand
MOST_ARGUMENTS = 64


def call_grammar(functions: Sequence[dict[str, Any]], start: int, end: int, several: bool = True) -> str:
    """Return a grammar in llguidance's Lark for one call or more.

    Arguments come in the order of the schema, and those that are not required may be left out. Their values are JSON,
    which is also a Python value as transformers reads it.

    Args:
        functions: what may be called, each with `name` and a JSON schema in `parameters`.
        start: the token before the list of calls.
        end: the token after it.
        several: whether there may be more than one call.

    Raises:
        Lfm2Error: a name cannot be written as LFM2 writes calls.
    """
    more = '(", " call)*' if several else ""
    rules = [f'start: <[{start}]> "[" call {more} "]" <[{end}]>']
    rules.append("call: " + " | ".join(f"call_{i}" for i in range(len(functions))))
    for i, function in enumerate(functions):
        rules += _rules_of(function, f"call_{i}")
    return "\n".join(rules)


def _rules_of(function: dict[str, Any], rule: str) -> list[str]:
    """Return the rules of one function. `first` rules stand before any argument is written, `more` rules after one."""
    schema = function.get("parameters") or {}
    if not isinstance(schema, dict) or not isinstance(schema.get("properties") or {}, dict):
        raise Lfm2Error(f"The parameters of {str(function['name'])[:60]} have to be a JSON schema of an object.")
    properties, required = schema.get("properties") or {}, schema.get("required") or []
    if len(properties) > MOST_ARGUMENTS:
        raise Lfm2Error(f"{function['name']} has {len(properties)} arguments; {MOST_ARGUMENTS} can be asked for.")
    shared = {name: schema[name] for name in SHARED if name in schema}
    rules = [f'{rule}: "{_named(function["name"])}(" {rule}_first_0 ")"']
    for i, (name, value) in enumerate(properties.items()):
        either = "" if name in required else " | {}"
        first, more = (f"{rule}_{kind}_{i + 1}" for kind in ("first", "more"))
        rules.append(f'{rule}_value_{i}: "{_named(name)}=" {_json(value, shared)}')
        rules.append(f"{rule}_first_{i}: {rule}_value_{i} {more}{either.format(first)}")
        rules.append(f'{rule}_more_{i}: ", " {rule}_value_{i} {more}{either.format(more)}')
    rules += [f'{rule}_{kind}_{len(properties)}: ""' for kind in ("first", "more")]
    return rules


def _named(name: Any) -> str:
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise Lfm2Error(f"{str(name)[:60]!r} is no name that a call can have, so the call cannot be asked for.")
    return name


def _json(schema: Any, shared: dict[str, Any]) -> str:
    if schema is True or schema == {}:
        schema = {"type": ["string", "number", "boolean", "null", "array", "object"]}
    if not isinstance(schema, dict):
        raise Lfm2Error(f"{json.dumps(schema)[:60]} is no JSON schema of an argument.")
    # Without blanks between its tokens: a small model writes nothing else for long.
    return "%json " + json.dumps({**shared, **schema, "x-guidance": {"whitespace_flexible": False}})
