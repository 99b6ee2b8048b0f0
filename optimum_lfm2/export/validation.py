"""Whether an exported file computes what transformers computes. Whatever cannot be compared counts as wrong.

The file is compared piece by piece: each piece is fed what transformers computes before it. So a difference shows where
it arises, rounding does not add up, and the peak of memory does not grow with the model. Then the file is run once as a
whole, as clients run it, where memory allows.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from optimum.utils import logging
from tqdm import tqdm
from transformers import PreTrainedModel

from optimum_lfm2.caches import LOGITS_TO_KEEP
from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.export.pieces import Cut, Piece, Values, find_cuts, open_session, outputs_of, split
from optimum_lfm2.export.reference import Reference, norm_names


# Of a token's values, a share of their length that the file run as a whole may differ: 8-bit activations add up over
# the layers, and a router near a tie may choose another expert, so that of each output only the median token counts.
WHOLE_TOLERANCE = 0.25
MEMORY_OF_A_SESSION = 2.5  # bytes for each byte of the file: the mapped file, and copies that kernels rearrange

logger = logging.get_logger(__name__)


def validated(original: Callable[..., None], config_class: type) -> Callable[..., None]:
    """Optimum's `validate_model_outputs`, which validates ours for an `OnnxConfig` of `config_class`."""

    @functools.wraps(original)
    def validate_model_outputs(config: Any, reference_model: Any, onnx_model: Path, *args: Any, **options: Any) -> None:
        if not isinstance(config, config_class):
            original(config, reference_model, onnx_model, *args, **options)
        else:
            validate(config, reference_model, onnx_model, options.get("atol"), options.get("input_shapes"))

    return validate_model_outputs


@contextmanager
def errors_as_they_are() -> Iterator[None]:
    """Raise what validation raised, which Optimum wraps in a `RuntimeError`."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error.__cause__, (Lfm2Error, OSError)):
            raise error.__cause__ from None
        raise


def validate(
    config: Any, model: PreTrainedModel, path: Path, atol: float | None = None, shapes: Mapping[str, int] | None = None
) -> dict[str, float]:
    """Compare a file with transformers, on every visible token of some dummy inputs.

    Args:
        config: the `OnnxConfig` of the export, which has its weights.
        model: transformers' model; its own weights are not read.
        path: the exported file.
        atol: the largest `relative_error` allowed in a piece; None: the configuration's.
        shapes: as `config.generate_dummy_inputs` takes them.

    Returns:
        The difference of each value, by the name of its layer or output.

    Raises:
        Lfm2Error: for a file that differs, or that cannot be compared.
    """
    atol = config.ATOL_FOR_VALIDATION if atol is None else atol
    file = ir.load(path)
    if (names := [value.name for value in file.graph.outputs]) != list(config.outputs):
        raise Lfm2Error(f"The file is wrong and was not kept: its outputs are {', '.join(names)}.")
    cuts = find_cuts(file.graph, norm_names(model))
    calls = config.validation_inputs(shapes or {})
    with tqdm(total=len(cuts) + 2, desc="Comparing with transformers", disable=None, leave=False) as bar:
        gold = Reference(config, model, cuts, calls).compute()
        bar.update()
        differences: dict[str, float] = {}
        for graph in split(file.graph, cuts, config.cache_tensors):
            exact = config.scheme is not None
            piece = Piece(graph, file, path.parent, gold[0], model.dtype, exact)
            for inputs, values in zip(calls, gold, strict=True):
                for name, difference in _compare(config, model, cuts, piece, inputs, values).items():
                    differences[name] = max(difference, differences.get(name, 0.0))
            del piece
            bar.update()
    _judge(differences, atol)
    _check_whole(config, path, calls, gold)
    return differences


def _compare(
    config: Any, model: Any, cuts: Sequence[Cut], piece: Piece, inputs: Mapping[str, Any], gold: Values
) -> dict[str, float]:
    """The `relative_error` of each output of a piece, by the name of its layer or output."""
    scales = gold | {
        after.hidden.name: gold[after.hidden.name] - gold[before.hidden.name] for before, after in pairwise(cuts)
    }
    labels = {cut.hidden.name: f"{cut.name}.input" for cut in cuts} | {cut.normed.name: cut.name for cut in cuts}
    residuals = {cut.hidden.name for cut in cuts}
    columns = {tensor.present: 2 for tensor in config.cache_tensors}
    precision = torch.finfo(model.dtype).eps
    differences = {}
    for name, values in piece.run(_feeds(config, inputs), gold).items():
        rounding = gold[name] * (precision if name in residuals else 0)
        error = relative_error(values - gold[name], scales[name], rounding, columns.get(name, 1))
        differences[labels.get(name, name)] = error
    return differences


def relative_error(difference: torch.Tensor, scale: torch.Tensor, rounding: torch.Tensor, axis: int) -> float:
    """By how much of the scale the difference exceeds the rounding: lengths of a token's vectors; the largest of all.

    For a residual stream the scale is what a block adds for the token. So an expert that is wrong shows beside a large
    residual.

    Args:
        difference, scale, rounding: (batch_size, ...). Where the scale is not a number, nothing is compared.
        axis: the one that counts tokens, or columns of a state.

    Returns:
        Not a number where nothing at all can be compared.
    """
    lengths = [values.movedim(axis, 1).flatten(2).norm(dim=2) for values in (difference, scale, rounding)]
    known = ~lengths[1].isnan()
    if not known.any():
        return math.nan
    error, length, least = (values[known] for values in lengths)
    return float(((error - least).clamp(min=0) / length.clamp(min=torch.finfo(torch.float32).tiny)).max())


def _judge(differences: Mapping[str, float], atol: float) -> None:
    wrong = {name: value for name, value in differences.items() if not value <= atol}  # not a number is wrong too
    if not differences or wrong:
        worst = max(wrong, key=lambda name: math.inf if math.isnan(wrong[name]) else wrong[name], default="nothing")
        raise Lfm2Error(
            f"The file is wrong and was not kept: {worst} differs from transformers by "
            f"{wrong.get(worst, math.nan):.2g} of its length, where {atol:.2g} is allowed ({len(wrong)} values "
            "differ). To accept that, use --atol."
        )


def _check_whole(config: Any, path: Path, calls: Sequence[Mapping[str, Any]], gold: Sequence[Values]) -> None:
    """Run the file as clients do, and compare the median token of each output."""
    size = sum(file.stat().st_size for file in (path, path.with_name(f"{path.name}_data")) if file.is_file())
    if MEMORY_OF_A_SESSION * size > available_memory():
        logger.info(f"{path} was compared layer by layer; there is no memory to run it as a whole.")
        return
    # A float kernel's copy of the weights would double the peak, and computes the same.
    session = open_session(path, path.parent, prepack=config.scheme is not None)
    for inputs, values in zip(calls, gold, strict=True):
        feeds = {name: tensor.numpy() for name, tensor in _feeds(config, inputs).items()}
        for name, own in outputs_of(session, feeds, values).items():
            axis = 2 if name.endswith((".key", ".value")) else 1
            error, length = (x.movedim(axis, 1).flatten(2).norm(dim=2) for x in (own - values[name], values[name]))
            known = ~length.isnan()
            median = float((error[known] / length[known].clamp(min=torch.finfo(torch.float32).tiny)).median())
            if not median <= WHOLE_TOLERANCE:
                raise Lfm2Error(
                    f"The file is wrong and was not kept: each of its layers computes what transformers computes, but "
                    f"as a whole its {name} differs by {median:.2g} of its length."
                )


def available_memory() -> float:
    """Bytes that can be used without swapping; infinite where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return math.inf
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), math.inf)


def _feeds(config: Any, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The whole graph's inputs of a call, by name."""
    feeds = {name: inputs[name] for name in ("input_ids", "attention_mask", LOGITS_TO_KEEP) if name in inputs}
    if config.use_past_in_inputs:
        feeds |= config.flatten_output_collection_property("past_key_values", inputs["past_key_values"])
    return feeds
