"""Which configurations the graph is right for. Others are refused by name, before any work."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from optimum_lfm2 import compat
from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.families import MEMBERS


# Those whose frequencies depend on nothing but the configuration; `dynamic` and `longrope` change them with the prompt.
ROPE_TYPES = ("default", "linear", "yarn", "llama3", "proportional")


def check_architecture(config: Mapping[str, Any]) -> None:
    """Refuse what the graph would compute wrongly.

    Args:
        config: the checkpoint's `config.json`, or `PretrainedConfig.to_dict()`.

    Raises:
        Lfm2Error: for a model, a layer type or a rope type that is not known.
    """
    compat.check_model_type(config.get("model_type", ""))
    member = MEMBERS[config["model_type"]]
    known = member.layer_kinds
    unknown = sorted(set(config.get("layer_types") or ()) - known.keys())
    if unknown:
        raise Lfm2Error(
            f"layer_types in config.json names {', '.join(map(str, unknown))}; it has {' and '.join(known)}. "
            "Is it a model of another family?"
        )
    for field, rope in _ropes(config):
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type not in ROPE_TYPES:
            raise Lfm2Error(
                f"{field} in config.json asks for {rope_type}, which no exported graph can do: its angles depend on "
                f"the prompt's length. Use {', '.join(ROPE_TYPES)}."
            )
    member.check(config)


def _ropes(config: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The parameters of each rope, and the field that has them: one for all layers, or one for each kind."""
    for field in ("rope_scaling", "rope_parameters"):
        rope = config.get(field) or {}
        by_kind = [value for value in rope.values() if isinstance(value, Mapping)]
        yield from ((field, value) for value in by_kind or [rope])
