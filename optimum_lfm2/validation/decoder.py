"""Check that an exported file computes the same as transformers. A value that cannot be compared counts as wrong.

The file is compared piece by piece, and the inputs of each piece are transformers' values. So a difference shows where
it arises, rounding does not add up, and peak memory does not grow with the model. Then the whole file runs once, as
clients run it, if memory allows.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import pairwise
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from optimum.utils import logging
from tqdm import tqdm
from transformers import PreTrainedModel

from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.validation.export_config import ExportConfig
from optimum_lfm2.validation.pieces import (
    Cut,
    Piece,
    Values,
    find_cuts,
    keep_activations_float,
    open_session,
    outputs_of,
    split,
)
from optimum_lfm2.validation.reference import Reference, norm_names
from optimum_lfm2.validation.trusted import compare_trusted


# The relative error of the median token that the whole file may have. Errors add up over the layers, and near a tie a
# router may choose another expert, so the worst token says nothing.
WHOLE_TOLERANCE = 0.25
MEMORY_OF_A_SESSION = 2.5  # bytes a byte of the file: the mapped file, and kernels' rearranged copies

logger = logging.get_logger(__name__)
_noted: ContextVar[dict[Path, float] | None] = ContextVar("noted", default=None)  # of `noted_differences`


def validated(original: Callable[..., None], config_class: Any) -> Callable[..., None]:
    """Wrap Optimum's `validate_model_outputs` so that a configuration of `config_class` validates its file itself.

    Every other configuration goes to Optimum's function with unchanged arguments.
    """

    @functools.wraps(original)
    def validate_model_outputs(config: Any, reference_model: Any, onnx_model: Path, *args: Any, **options: Any) -> None:
        if not isinstance(config, config_class):
            original(config, reference_model, onnx_model, *args, **options)
        else:
            found = config.validate(reference_model, onnx_model, options.get("atol"), options.get("input_shapes"))
            if (noted := _noted.get()) is not None:
                noted[Path(onnx_model)] = max(found.values())

    return validate_model_outputs


@contextmanager
def noted_differences() -> Iterator[dict[Path, float]]:
    """Within the `with` block, note the largest difference that the validation of each file of ours finds."""
    found: dict[Path, float] = {}
    before = _noted.set(found)
    try:
        yield found
    finally:
        _noted.reset(before)


@contextmanager
def errors_as_they_are() -> Iterator[None]:
    """Within the `with` block, raise the original error of validation. Optimum wraps it in a `RuntimeError`."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error.__cause__, (Lfm2Error, OSError)):
            raise error.__cause__ from None
        raise


def validate(
    config: ExportConfig,
    model: PreTrainedModel,
    path: Path,
    atol: float | None = None,
    shapes: Mapping[str, int] | None = None,
) -> dict[str, float]:
    """Compare an exported file with transformers on every unmasked token of the validation inputs.

    Args:
        config: the `OnnxConfig` of the export. It has the weights.
        model: transformers' model. Its own weights are not read.
        path: the exported file.
        atol: the largest `relative_error` that a piece may have. None takes the configuration's.
        shapes: `batch_size` and `sequence_length` of the inputs, in place of the defaults.

    Returns:
        The relative error of each compared value, by the name of its module or output.

    Raises:
        Lfm2Error: the file differs or cannot be compared; or the reference differs from the checkpoint's own code,
            which runs if the user trusts it.
    """
    atol = config.ATOL_FOR_VALIDATION if atol is None else atol
    file = ir.load(path)
    if (names := [value.name for value in file.graph.outputs]) != list(config.outputs):
        raise Lfm2Error(f"The file is wrong and was not kept: its outputs are {', '.join(names)}.")
    cuts = find_cuts(file.graph, norm_names(model))
    calls = config.validation_inputs(shapes or {})
    axes = token_axes(config)
    with tqdm(total=len(cuts) + 2, desc="Comparing with transformers", disable=None, leave=False) as bar:
        gold = Reference(config, model, cuts, calls).compute()
        bar.update()
        differences: dict[str, float] = {}
        for graph in split(file.graph, cuts, config.cache_tensors):
            exact = config.scheme is not None
            piece = Piece(graph, file, path.parent, gold[0], model.dtype, exact)
            for inputs, values in zip(calls, gold, strict=True):
                for name, difference in _compare(config, model, cuts, piece, inputs, values, axes).items():
                    differences[name] = max(difference, differences.get(name, 0.0))
            del piece
            bar.update()
    expected = [*(cut.name for cut in cuts), *config.outputs]
    if missing := [name for name in expected if name not in differences]:
        raise Lfm2Error(f"The file is wrong and was not kept: {missing[0]} could not be compared with transformers.")
    judge(differences, atol)
    _check_whole(config, file, path, calls, gold, axes)
    source: Any = getattr(model, "source", None)
    if source and source.trusted:
        compare_trusted(config, model, source, calls)
    return differences


def _compare(
    config: ExportConfig,
    model: Any,
    cuts: Sequence[Cut],
    piece: Piece,
    inputs: Mapping[str, Any],
    gold: Values,
    axes: Mapping[str, int],
) -> dict[str, float]:
    """Return the `relative_error` of each output of a piece, by the name of its module or output."""
    scales = gold | {
        after.hidden.name: gold[after.hidden.name] - gold[before.hidden.name] for before, after in pairwise(cuts)
    }
    labels = {cut.hidden.name: f"{cut.name}.input" for cut in cuts} | {cut.normed.name: cut.name for cut in cuts}
    residuals = {cut.hidden.name for cut in cuts}
    precision = torch.finfo(model.dtype).eps
    differences = {}
    for name, values in piece.run(_feeds(config, inputs), gold).items():
        rounding = gold[name] * (precision if name in residuals else 0)
        error = relative_error(values - gold[name], scales[name], rounding, axes.get(name, 1))
        differences[labels.get(name, name)] = error
    return differences


def relative_error(difference: torch.Tensor, scale: torch.Tensor, rounding: torch.Tensor, axis: int) -> float:
    """Return the relative error of the worst token: (|difference| - |rounding|) / |scale|, at least 0.

    |x| is the length of a token's vector. The scale of a residual stream is what a block adds to it for the token. So a
    wrong expert shows even if the residual is large.

    Args:
        difference, scale, rounding: float32 (batch_size, ...), of one shape. A token whose scale is NaN is skipped.
        axis: the axis of tokens, or of a state's columns.

    Returns:
        The relative error, or NaN if all tokens are skipped.
    """
    lengths = [_lengths(values, axis) for values in (difference, scale, rounding)]
    known = ~lengths[1].isnan()
    if not known.any():
        return math.nan
    error, length, least = (values[known] for values in lengths)
    return float(((error - least).clamp(min=0) / length.clamp(min=torch.finfo(torch.float32).tiny)).max())


def judge(differences: Mapping[str, float], atol: float) -> None:
    """Raise `Lfm2Error` if a difference exceeds `atol`, or is NaN."""
    wrong = {name: value for name, value in differences.items() if not value <= atol}  # NaN is wrong too
    if wrong:
        worst = max(wrong, key=lambda name: math.inf if math.isnan(wrong[name]) else wrong[name])
        raise Lfm2Error(
            f"The file is wrong and was not kept: {worst} differs from transformers by {wrong[worst]:.2g} of its "
            f"length, where {atol:.2g} is allowed ({len(wrong)} values differ). To accept that, use --atol."
        )


def _check_whole(
    config: ExportConfig,
    file: ir.Model,
    path: Path,
    calls: Sequence[Mapping[str, Any]],
    gold: Sequence[Values],
    axes: Mapping[str, int],
) -> None:
    """Run the whole file, and compare the median token of each output. Quantised operators keep activations in float.

    The errors of activations in 8 bits add up: over 24 layers of experts, a right file may look wrong. If memory does
    not allow the run, only the log says so.

    Raises:
        Lfm2Error: the file fails, or an output differs by more than `WHOLE_TOLERANCE`.
    """
    size = sum(file.stat().st_size for file in (path, path.with_name(f"{path.name}_data")) if file.is_file())
    if MEMORY_OF_A_SESSION * size > available_memory():
        logger.info(f"{path} was compared layer by layer; there is no memory to run it as a whole.")
        return
    if config.scheme is None:
        # Kernels of float weights would keep a rearranged copy, which doubles the peak and computes the same.
        session = open_session(path, path.parent, prepack=False)
    else:
        keep_activations_float(file.graph)
        session = open_session(ir.to_proto(file).SerializeToString(), path.parent)
    for inputs, values in zip(calls, gold, strict=True):
        feeds = {name: tensor.numpy() for name, tensor in _feeds(config, inputs).items()}
        for name, own in outputs_of(session, feeds, values).items():
            axis = axes.get(name, 1)
            error, length = (_lengths(x, axis) for x in (own - values[name], values[name]))
            known = ~length.isnan()
            median = float((error[known] / length[known].clamp(min=torch.finfo(torch.float32).tiny)).median())
            if not median <= WHOLE_TOLERANCE:
                raise Lfm2Error(
                    f"The file is wrong and was not kept: each of its layers computes what transformers computes, but "
                    f"as a whole its {name} differs by {median:.2g} of its length."
                )


def token_axes(config: ExportConfig) -> dict[str, int]:
    """Return the axis that counts tokens, by output. A value that is not among them has its tokens on axis 1.

    It is 0 for an output with one vector a row. Caches say it themselves.
    """
    axes = {name: 0 for name, shape in config.output_shapes().items() if shape and len(shape) == 2}
    for tensor in config.cache_tensors:
        axes |= dict.fromkeys((tensor.present, tensor.columns), tensor.state.token_axis or 0)
    return axes


def _lengths(values: torch.Tensor, axis: int) -> torch.Tensor:
    """Return the length of each token's vector, (batch_size, tokens)."""
    tokens = values.movedim(axis, 1) if axis else values[:, None]
    return tokens.flatten(2).norm(dim=2)


def available_memory() -> float:
    """Return the bytes that can be used without swapping, or infinity if the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return math.inf
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), math.inf)


def _feeds(config: ExportConfig, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return the inputs of the whole graph for a call, by name."""
    feeds = {name: inputs[name] for name in config.inputs if name in inputs}
    if config.use_past_in_inputs:
        feeds |= config.flatten_output_collection_property("past_key_values", inputs["past_key_values"])
    return feeds
