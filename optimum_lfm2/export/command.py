"""`optimum-cli export onnx` for LFM2: check, export into a staging folder, validate, move into place."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import onnxruntime

from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.export import options
from optimum_lfm2.export.staging import staged
from optimum_lfm2.export.validation import strict_validation


# Loggers whose warnings of this export nobody can act on.
QUIET = (
    "huggingface_hub.repocard",
    "transformers.configuration_utils",
    "transformers.generation.configuration_utils",
    "transformers.distributed",  # speaks up when modeling_utils is silent
    "transformers.integrations",  # says that a package for GPUs is missing
    "transformers.modeling_utils",
)
VALIDATION = "optimum.exporters.onnx.convert"  # logs every difference; ours says the largest


def run_export(command: Any, original: Callable[[Any], None], config: Mapping[str, Any]) -> None:
    """Run Optimum's own command for an LFM2 checkpoint.

    Args:
        command: the `ONNXExportCommand`.
        original: Optimum's `run`.
        config: the checkpoint's `config.json`.

    Raises:
        SystemExit: 1 after one line on stderr for bad input, 130 when interrupted.
    """
    with reported():
        options.check(command.args, config)
        with (
            staged(command.args.output) as folder,
            _arguments(command, folder),
            quiet(),
            strict_validation(command.args.atol),
        ):
            original(command)


@contextmanager
def reported() -> Iterator[None]:
    """Turn an error of the block into one line on stderr.

    Raises:
        SystemExit: 1 for bad input, 130 when interrupted.
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
    """Silence, for as long as the block runs, the warnings of other libraries that a user can do nothing about."""
    with (
        warnings.catch_warnings(),
        _at_level(logging.ERROR, *QUIET),
        _at_level(logging.CRITICAL, VALIDATION),
        patch.object(onnxruntime, "SessionOptions", _QuietSessionOptions),
    ):
        warnings.filterwarnings("ignore", message=".*torch_dtype.*")
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"(torch|optimum)\.")
        yield


class _QuietSessionOptions(onnxruntime.SessionOptions):
    """For a session of Optimum: onnxruntime warns of every input with a default, such as `num_logits_to_keep`.

    The severity is set for the session. The process' own stays as it is: onnxruntime 1.32 does not tell it, so that
    nobody could put it back.
    """

    def __init__(self) -> None:
        super().__init__()
        self.log_severity_level = 3  # errors


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
