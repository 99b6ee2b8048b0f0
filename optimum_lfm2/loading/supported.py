"""Refuse checkpoints for which the graph would be wrong. The error names the cause, before any work."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnxruntime
from packaging import version

from optimum_lfm2 import compat
from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.families import MEMBERS, member_of
from optimum_lfm2.fields import ropes
from optimum_lfm2.graph.member import Member
from optimum_lfm2.loading.config_check import check_fields


# Their frequencies depend on the configuration alone. Those of `dynamic` and `longrope` change with the prompt.
ROPE_TYPES = ("default", "linear", "yarn", "llama3", "proportional")


def check_architecture(config: Mapping[str, Any], file: str = "config.json") -> Member:
    """Refuse what the graph would compute wrongly, and return the record of the model's member.

    Args:
        config: the checkpoint's `config.json`, or the part of it that describes its decoder.
        file: the file's name for the error.

    Raises:
        Lfm2Error: the model, a class, a layer type or a rope type is not known; the checkpoint brings code of its own;
            its weights are quantised already; or `check_fields` refuses it.
    """
    compat.check_model_type(config.get("model_type", ""))
    member = member_of(config)
    check_onnxruntime(member)
    check_fields(config, file)
    _check_classes(config, member)
    _check_quantized(config)
    if member.text is not None:  # the field of the decoder's configuration
        text = {"model_type": member.text_type, **(config.get(member.text) or {})}
        _check_text(text, f"{member.text} of {file}")
    known = member.layer_kinds
    unknown = sorted(set(config.get("layer_types") or ()) - known.keys())
    if unknown:
        raise Lfm2Error(
            f"layer_types in {file} names {', '.join(map(str, unknown))}; it has {' and '.join(known)}. "
            "Is it a model of another family?"
        )
    for field, rope in ropes(config):
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type not in ROPE_TYPES:
            raise Lfm2Error(
                f"{field} in {file} asks for {rope_type}, which no exported graph can do: its angles depend on "
                f"the prompt's length. Use {', '.join(ROPE_TYPES)}."
            )
    member.check(config)
    return member


def check_onnxruntime(member: Member) -> None:
    """Raise `Lfm2Error` where the installed onnxruntime lacks an operator of the member's graph."""
    needed, installed = member.min_onnxruntime, onnxruntime.__version__
    if needed and version.parse(installed) < version.parse(needed):
        raise Lfm2Error(
            f"{member.title} needs onnxruntime {needed}, which has the operator LinearAttention, and {installed} is "
            "installed. Upgrade it: pip install --upgrade onnxruntime."
        )


def _check_text(text: Mapping[str, Any], file: str) -> None:
    """Refuse the decoder of a model that has other parts too."""
    known = [member.model_type for member in MEMBERS if member.decodes]
    if text["model_type"] not in known or not member_of(text).decodes:
        raise Lfm2Error(
            f"model_type in the {file} is {text['model_type']}; it has to be {' or '.join(known)}, of a decoder."
        )
    check_architecture(text, f"the {file}")


def _check_classes(config: Mapping[str, Any], member: Member) -> None:
    known = tuple(member.architectures)
    names = config.get("architectures") or []
    if unknown := [name for name in names if (member.spelled(name) or name) not in known]:
        raise Lfm2Error(
            f"The checkpoint is a {', '.join(unknown)} (architectures in config.json), which computes something else "
            f"than {' and '.join(known)}: these are exported."
        )
    # Whatever the classes are called, what they compute is in the checkpoint's own code.
    classes = sorted({str(name) for name in (config.get("auto_map") or {}).values() if not member.own_code(str(name))})
    if classes:
        raise Lfm2Error(
            f"The checkpoint brings its own code: auto_map in config.json names {', '.join(classes)}. What it computes "
            f"is not known here. If it is what transformers' {known[0]} computes, remove auto_map."
        )


def _check_quantized(config: Mapping[str, Any]) -> None:
    for field in ("quantization_config", "quantization"):  # the second is MLX's
        settings = config.get(field)
        if settings is None:
            continue
        method = settings.get("quant_method") if isinstance(settings, dict) else settings
        if method is None:  # MLX repeats its own settings under both names
            method = "MLX" if "group_size" in settings else "unknown"
        raise Lfm2Error(
            f"The checkpoint is quantised already: {field} in config.json says {method}. "
            "Export the original checkpoint, with --variant q4, q4s or q8."
        )
