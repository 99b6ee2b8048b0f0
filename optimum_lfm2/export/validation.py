"""Optimum's validation, made to count: a file that computes something else is an error, not a logged warning."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from optimum.exporters.error_utils import AtolError, OutputMatchError, ShapeError
from optimum.exporters.onnx import convert

from optimum_lfm2.errors import Lfm2Error


def validated_by_config(original: Callable[..., None]) -> Callable[..., None]:
    """Optimum's `validate_model_outputs`, for a config that has a method `validate` replaced by that."""

    @functools.wraps(original)
    def validate(config: Any, reference_model: Any, onnx_model: Path, *args: Any, **arguments: Any) -> None:
        if not hasattr(config, "validate"):
            original(config, reference_model, onnx_model, *args, **arguments)
        else:
            config.validate(reference_model, onnx_model, arguments["atol"], arguments.get("input_shapes") or {})

    return validate


@contextmanager
def strict_validation(atol: float | None) -> Iterator[None]:
    """Raise where Optimum would log that the file's outputs differ from transformers'.

    Args:
        atol: what the user allows, an absolute difference. None: the configuration's tolerance, and for an output whose
            values exceed 1 it is relative to the largest: conv states reach tens, and their rounding grows with them.

    Raises:
        Lfm2Error: from within the block.
    """
    validate = convert.validate_models_outputs

    def strict(models_and_onnx_configs: Mapping[str, tuple[Any, Any]], **arguments: Any) -> None:
        try:
            validate(models_and_onnx_configs, **arguments)
        except AtolError as error:
            ((_, config),) = models_and_onnx_configs.values()
            _judge(_differences(error), config, atol)
        except (OutputMatchError, ShapeError) as error:
            raise Lfm2Error(f"The file is wrong and was not kept. {' '.join(str(error).split())}") from error

    with patch.object(convert, "validate_models_outputs", strict):
        try:
            yield
        except RuntimeError as error:  # Optimum wraps what validation raises
            if isinstance(error.__cause__, (Lfm2Error, OSError)):
                raise error.__cause__ from None
            raise


def check_file(
    path: Path, config: Any, model: Any, outputs: list[str], model_kwargs: dict[str, Any], atol: float | None
) -> dict[str, float]:
    """Run one file and transformers on the same inputs, as Optimum's validation does.

    Args:
        path: the exported file.
        config, model, model_kwargs: what it was exported with.
        outputs: its outputs, in order.
        atol: as in `strict_validation`.

    Returns:
        The largest difference of each output; none where all are no more than rounding.

    Raises:
        Lfm2Error: for a file that onnxruntime does not run, or that computes something else.
    """
    try:
        convert.validate_model_outputs(
            config, model, path, outputs, atol=0.0, use_subprocess=False, model_kwargs=model_kwargs
        )
    except AtolError as error:
        differences = _differences(error)
        _judge(differences, config, atol)
        return differences
    except (Lfm2Error, OSError):
        raise
    except Exception as error:  # onnxruntime has a class for each status, and no common one
        raise Lfm2Error(f"The file is wrong and was not kept. {' '.join(str(error).split())}") from error
    return {}


def _differences(error: AtolError) -> dict[str, float]:
    """The largest difference of each output that Optimum complains of; only its message has them."""
    return {name: float(value) for name, value in re.findall(r"- (\S+): max diff = (\S+)", str(error))}


def _judge(differences: Mapping[str, float], config: Any, atol: float | None) -> None:
    magnitudes = config.magnitudes if atol is None else {}
    atol = config.ATOL_FOR_VALIDATION if atol is None else atol
    allowed = {name: atol * max(1.0, magnitudes.get(name, 0.0)) for name in differences}
    excess = {name: value / (allowed[name] or math.ulp(0.0)) for name, value in differences.items()}
    wrong = {name: ratio for name, ratio in excess.items() if not ratio <= 1}  # not a number is wrong too
    if not wrong:
        return
    worst = max(wrong, key=lambda name: math.inf if math.isnan(wrong[name]) else wrong[name])
    raise Lfm2Error(
        f"The file is wrong and was not kept: {worst} differs from transformers by {differences[worst]:.2g}, where "
        f"{allowed[worst]:.2g} is allowed ({len(wrong)} outputs differ). To accept that, use --atol."
    )
