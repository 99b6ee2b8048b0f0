"""Check the options of `optimum-cli export onnx`. Those that make no sense for LFM2 are refused before any work."""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Callable, Mapping
from functools import wraps
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from optimum.exporters.tasks import TasksManager
from optimum.utils import DEFAULT_DUMMY_SHAPES

from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.export.model_kwargs import ExportOptions
from optimum_lfm2.export.output import check_output
from optimum_lfm2.families import CLAIMED, MODEL_TYPES, member_of
from optimum_lfm2.graph.member import Member
from optimum_lfm2.loading.source import check_dtype
from optimum_lfm2.loading.supported import check_architecture
from optimum_lfm2.weights.blocks import SCHEMES


OPSETS = range(18, 21)  # below 18 torch writes older forms of some operators; its TorchScript exporter ends at 20
TEXT_SHAPES = ("batch_size", "sequence_length")


def check(args: Namespace, config: Mapping[str, Any], gguf: bool = False) -> Member:
    """Refuse options that would fail, give a wrong file, or have no effect. Return the record of the model's member.

    Args:
        args: the parsed arguments of `optimum-cli export onnx`.
        config: the checkpoint's `config.json`.
        gguf: whether the checkpoint is a GGUF file, whose weights may be quantised whatever the variant is.

    Raises:
        Lfm2Error: an option is refused. One line says why, and what to do instead.
    """
    member = check_model(args.model, config)
    check_output(Path(args.output), member.in_parts)
    _check_library(args)
    _check_task(args, member, config.get("architectures"))
    _check_precision(args)
    _check_computation(args)
    _check_variant(args, member, gguf)
    _check_rewrites(args)
    _check_inputs(args, config)
    if args.pad_token_id is not None:
        raise Lfm2Error("--pad_token_id: the graph takes padding from attention_mask alone. Leave it out.")
    return member


def check_model(model: str, config: Mapping[str, Any]) -> Member:
    """Refuse a checkpoint that cannot be exported with any options. Return the record of its member.

    Args:
        model: the folder or id that the user gave, for the message.
        config: the checkpoint's `config.json`.

    Raises:
        Lfm2Error: its model type or its architecture is not one of ours.
    """
    if (model_type := config.get("model_type")) not in MODEL_TYPES:
        raise Lfm2Error(
            f"{model} is of the type {model_type}, which this version of optimum-lfm2 does not export. "
            f"It exports {', '.join(MODEL_TYPES)}."
        )
    return check_architecture(config)


def heeding_options(export: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap Optimum's `onnx_export_from_model` so that Python's `main_export` refuses for our models what `check` does.

    `variant` means `_variant` there. optimum-onnx 0.1.0 takes an unknown keyword for a shape, and ignores it silently.

    Args:
        export: Optimum's function.

    Raises:
        Lfm2Error: from the wrapper, for a model of ours: a keyword that nothing takes, or an option that would fail,
            give a wrong file or have no effect.
    """
    own = signature(export)
    parameters = own.parameters
    known = {*parameters, *DEFAULT_DUMMY_SHAPES}
    defaults = {name: parameter.default for name, parameter in parameters.items()} | DEFAULT_DUMMY_SHAPES

    @wraps(export)
    def wrapped(model: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(getattr(model, "config", None), "model_type", None) in CLAIMED:
            variant = kwargs.pop("variant", None)
            if variant is not None:
                kwargs["_variant"] = variant
            if unknown := sorted(kwargs.keys() - known):
                raise Lfm2Error(f"main_export knows no {', '.join(unknown)}. Leave it out, or correct its name.")
            options = Namespace(**{**defaults, **own.bind_partial(model, *args).arguments, **kwargs})
            check_output(Path(options.output), member_of(model.config).in_parts)
            _check_computation(options)
            _check_rewrites(options)
            _check_inputs(options, vars(model.config))
        return export(model, *args, **kwargs)

    return wrapped


def check_atol(atol: float | None) -> None:
    """Raise `Lfm2Error` for a tolerance that is negative or not finite. None is allowed."""
    if atol is not None and not (math.isfinite(atol) and atol >= 0):
        raise Lfm2Error(f"--atol {atol}: a tolerance is a number from 0 on, such as 1e-4.")


def _check_library(args: Namespace) -> None:
    if args.library_name not in (None, "transformers"):
        raise Lfm2Error(f"--library-name {args.library_name}: it is a model of transformers. Leave the option out.")


def _check_task(args: Namespace, member: Member, architectures: list[str] | None) -> None:
    task = TasksManager.map_from_synonym(args.task)
    if task != "auto":
        member.check_task(task, architectures)
    if args.monolith and member.in_parts:
        raise Lfm2Error("--monolith means one file, and this model has three. Leave it out.")
    if args.monolith and task.endswith("-with-past"):
        raise Lfm2Error(
            f"--monolith means a graph without cache. Leave it out, or use --task {task.removesuffix('-with-past')}."
        )


def _check_precision(args: Namespace) -> None:
    check_dtype(torch.bfloat16 if args.dtype == "bf16" else None)


def _check_computation(args: Namespace) -> None:
    check_atol(args.atol)
    if args.device != "cpu":
        raise Lfm2Error(
            f"--device {args.device}: weights go straight from the checkpoint into the file, so no GPU would help. "
            "Leave it out; the file runs on every device."
        )


def _check_variant(args: Namespace, member: Member, gguf: bool) -> None:
    task = member.tasks[0] if member.in_parts else "text-generation"
    constructor = TasksManager.get_exporter_config_constructor(
        "onnx", model_type=member.model_type, task=task, library_name="transformers"
    )
    constructor.func.check_variant(args.variant, member.title)
    ExportOptions.read(args.model_kwargs, args.variant in SCHEMES or (gguf and args.variant != "float"), member.options)


def _check_rewrites(args: Namespace) -> None:
    if args.opset is not None and args.opset not in OPSETS:
        raise Lfm2Error(
            f"--opset {args.opset}: models are exported with {OPSETS[0]} to {OPSETS[-1]}; {OPSETS[0]} runs everywhere."
        )
    for option in ("optimize", "slim"):
        if getattr(args, option):
            raise Lfm2Error(
                f"--{option}: the graph is made of onnxruntime's fused operators already, and its weights would be "
                "loaded into memory as a whole. Leave it out."
            )
    if args.no_dynamic_axes:
        raise Lfm2Error("--no-dynamic-axes: a decoder of fixed shape cannot grow its cache. Leave it out.")


def _check_inputs(args: Namespace, config: Mapping[str, Any]) -> None:
    for name, default in DEFAULT_DUMMY_SHAPES.items():
        value = getattr(args, name, default)
        if name in TEXT_SHAPES and value < 1:
            raise Lfm2Error(f"--{name} {value}: an example input has at least one. Leave it out for the default.")
        if name not in TEXT_SHAPES and value != default:
            raise Lfm2Error(f"--{name}: the graph's inputs have no such axis. Leave it out.")
    text = config.get("text_config") or config
    longest = (text if isinstance(text, Mapping) else vars(text)).get("max_position_embeddings")
    if longest and args.sequence_length > longest:
        raise Lfm2Error(f"--sequence_length {args.sequence_length}: the model goes to {longest} tokens. Use fewer.")
