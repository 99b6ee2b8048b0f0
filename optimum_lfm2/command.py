"""`optimum-cli export onnx` for LFM2: check the request, export to a staging folder, validate, move into place."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.export import options
from optimum_lfm2.export.staging import staged
from optimum_lfm2.validation.decoder import errors_as_they_are


# Loggers whose warnings a user of the export cannot act on.
QUIET = (
    "huggingface_hub.repocard",
    "transformers.configuration_utils",
    "transformers.generation.configuration_utils",
    "transformers.distributed",  # warns in place of modeling_utils where that is silenced
    "transformers.integrations",  # warns that a package for GPUs is missing
    "transformers.modeling_utils",
)


def run_export(command: Any, original: Callable[[Any], None], config: Mapping[str, Any]) -> None:
    """Run Optimum's own command for an LFM2 checkpoint.

    Args:
        command: the `ONNXExportCommand`.
        original: Optimum's `run`.
        config: the checkpoint's `config.json`.

    Raises:
        SystemExit: 1 for bad input or a failing file system, 130 when interrupted. One line on stderr says why.
    """
    with reported():
        options.check(command.args, config)
        with (
            staged(command.args.output) as folder,
            _arguments(command, folder),
            quiet(),
            errors_as_they_are(),
        ):
            original(command)


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
