"""`optimum-cli export onnx` for LFM2: check, export into a staging folder, validate, move into place."""

from __future__ import annotations

import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import onnxruntime
from optimum.exporters.error_utils import AtolError, OutputMatchError, ShapeError
from optimum.exporters.onnx import convert

import optimum_lfm2  # noqa: F401  registers LFM2 with Optimum
from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.export import options
from optimum_lfm2.export.staging import staged


# Loggers whose warnings of this export nobody can act on.
QUIET = (
    "transformers.configuration_utils",
    "transformers.generation.configuration_utils",
    "transformers.modeling_utils",
)


def run_export(command: Any, original: Callable[[Any], None], config: Mapping[str, Any]) -> None:
    """Run Optimum's own command for an LFM2 checkpoint.

    Args:
        command: the `ONNXExportCommand`.
        original: Optimum's `run`.
        config: the checkpoint's `config.json`.

    Raises:
        SystemExit: 1 after one line on stderr for bad input, 130 when interrupted.
    """
    try:
        options.check(command.args, config)
        with staged(command.args.output) as folder, _arguments(command, folder), quiet(), _strict_validation():
            original(command)
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
def _strict_validation() -> Iterator[None]:
    """Optimum logs a warning where the file's values are wrong; a wrong file is worse than none."""
    validate = convert.validate_models_outputs

    def strict(*args: Any, **kwargs: Any) -> None:
        try:
            validate(*args, **kwargs)
        except (AtolError, OutputMatchError, ShapeError) as error:
            raise Lfm2Error(f"The file is wrong and was not kept. {_reason(error)}") from error

    with patch.object(convert, "validate_models_outputs", strict), _at_level(logging.CRITICAL, convert.__name__):
        try:
            yield
        except RuntimeError as error:  # Optimum wraps what validation raises
            if isinstance(error.__cause__, (Lfm2Error, OSError)):
                raise error.__cause__ from None
            raise


def _reason(error: Exception) -> str:
    differences = [(float(value), name) for name, value in re.findall(r"- (\S+): max diff = (\S+)", str(error))]
    if not differences:
        return " ".join(str(error).split())
    largest, name = max(differences)
    tolerance = re.search(r"tolerance (\S+):", str(error))
    return (
        f"{name} differs from transformers by {largest:.2g}, and {len(differences) - 1} more outputs differ; "
        f"allowed are {tolerance[1] if tolerance else 'less'}. To accept that, use --atol."
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Silence, for as long as the block runs, the warnings of other libraries that a user can do nothing about."""
    with warnings.catch_warnings(), _at_level(logging.ERROR, *QUIET):
        warnings.filterwarnings("ignore", message=".*torch_dtype.*")
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"(torch|optimum)\.")
        # It warns of every input with a default, such as num_logits_to_keep. Its own default is 2, warnings.
        onnxruntime.set_default_logger_severity(3)
        try:
            yield
        finally:
            onnxruntime.set_default_logger_severity(2)


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
