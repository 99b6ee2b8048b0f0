"""`optimum-cli export onnx` for LFM2: check the request, export to a staging folder, validate, move into place.

At its end it says on standard output what it wrote, what the check found, and what to do next.
"""

from __future__ import annotations

import logging
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from optimum.exporters.tasks import TasksManager
from transformers.utils import CONFIG_NAME

from optimum_lfm2.errors import Lfm2Error, read_object
from optimum_lfm2.export import options
from optimum_lfm2.export.staging import staged
from optimum_lfm2.families import CLAIMED
from optimum_lfm2.graph.member import Member
from optimum_lfm2.loading.gguf import standing_in
from optimum_lfm2.report import WITH_PAST, loading, megabytes, size_with_weights, text_table
from optimum_lfm2.validation.decoder import errors_as_they_are, noted_differences
from optimum_lfm2.weights.blocks import SCHEMES


# Loggers whose warnings a user of the export cannot act on.
QUIET = (
    "huggingface_hub.repocard",
    "transformers.configuration_utils",
    "transformers.generation.configuration_utils",
    "transformers.distributed",  # warns in place of modeling_utils where that is silenced
    "transformers.integrations",  # warns that a package for GPUs is missing
    "transformers.modeling_utils",
)


def run_export(
    command: Any, original: Callable[[Any], None], config: Mapping[str, Any], gguf: str | None = None
) -> None:
    """Run Optimum's own command for an LFM2 checkpoint.

    Args:
        command: the `ONNXExportCommand`.
        original: Optimum's `run`.
        config: the checkpoint's `config.json`.
        gguf: the GGUF file that `--model` stands for.

    Raises:
        SystemExit: 1 for bad input or a failing file system, 130 when interrupted. One line on stderr says why.
    """
    if config["model_type"] not in CLAIMED:  # Optimum has a configuration of its own for it
        original(command)
        return
    with reported():
        member = options.check(command.args, config, gguf is not None)
        with (
            staged(command.args.output) as folder,
            _arguments(command, folder),
            quiet(),
            errors_as_they_are(),
            noted_differences() as differences,
        ):
            original(command)
        found = {path.relative_to(folder): difference for path, difference in differences.items()}
        print(_summary(command.args, member, config.get("architectures"), found, gguf))


def run_gguf_export(command: Any, original: Callable[[Any], None]) -> None:
    """Run Optimum's own command for a GGUF file, as `run_export` does for a checkpoint.

    Args:
        command: the `ONNXExportCommand`.
        original: Optimum's `run`.
    """
    file = str(Path(command.args.model, command.args.gguf_file or ""))
    with reported(), opened_gguf(command.args) as config:
        run_export(command, original, config, file)


@contextmanager
def opened_gguf(args: Any) -> Iterator[dict[str, Any]]:
    """Within the `with` block, `args.model` is a folder that stands for the GGUF file. Yield its config.json."""
    with (
        standing_in(args.model, args.gguf_file, args.tokenizer, cache_dir=args.cache_dir) as folder,
        patch.multiple(args, model=str(folder)),
    ):
        yield read_object(folder / CONFIG_NAME)


def _summary(
    args: Any,
    member: Member,
    architectures: list[str] | None,
    differences: Mapping[Path, float],
    model: str | None = None,
) -> str:
    """Return what the command says at its end.

    Args:
        args: the arguments.
        member: the record of the model's member.
        architectures: as in the checkpoint's `config.json`.
        differences: for each file, relative to the output, the largest difference that its check found.
        model: the checkpoint, as the user named it. None takes `--model`.
    """
    model = model or args.model
    files = {args.output / name: difference for name, difference in differences.items()}
    rows = [
        (
            str(path),
            f"{megabytes(size_with_weights(path))} MB",
            f"checked against transformers: within {difference:.2g}",
        )
        for path, difference in sorted(files.items())
    ]
    task = TasksManager.map_from_synonym(args.task)
    if task == "auto":
        task = member.task(architectures)
    lines = [text_table(rows)]
    if code := loading(task, args.output, member.loader):
        lines += ["Load it in Python:", code]
    # A decoder without its head predicts no tokens that could be compared.
    if member.encodes or task.removesuffix(WITH_PAST) != "feature-extraction":
        checkpoint = shlex.quote(model) if Path(model).exists() else "CHECKPOINT"
        cost = "Measure what the rounding of the weights costs:" if args.variant in SCHEMES else "Measure its quality:"
        evaluate = f"optimum-cli lfm2 evaluate {shlex.quote(str(args.output))} --reference {checkpoint} --text FILE"
        lines += [cost, f"  {evaluate}"]
    return "\n".join(lines)


@contextmanager
def reported() -> Iterator[None]:
    """Report an error in the `with` block as one line on stderr.

    Raises:
        SystemExit: 1 for bad input or a failing file system, 130 when interrupted.
    """
    try:
        yield
    except Lfm2Error as error:
        _fail(str(error), error)
    except OSError as error:
        _fail(" ".join(str(error).split()), error)
    except KeyboardInterrupt:
        print("optimum-cli: interrupted; nothing was written.", file=sys.stderr)
        raise SystemExit(130) from None


def _fail(line: str, error: BaseException) -> None:
    print(f"optimum-cli: error: {line}", file=sys.stderr)
    raise SystemExit(1) from error


@contextmanager
def _arguments(command: Any, folder: Any) -> Iterator[None]:
    with patch.multiple(command.args, output=folder, library_name="transformers"):
        yield


@contextmanager
def quiet() -> Iterator[None]:
    """Within the `with` block, silence warnings of other libraries that a user cannot act on."""
    with warnings.catch_warnings(), _at_level(logging.ERROR, *QUIET):
        warnings.filterwarnings("ignore", message=".*torch_dtype.*")
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"(torch|optimum)\.")
        yield


@contextmanager
def _at_level(level: int, *names: str) -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in names]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(level)
    try:
        yield
    finally:
        for logger, old in zip(loggers, before, strict=True):
            logger.setLevel(old)
