"""Validation in bounded memory: the graph is cut at its norms, and each piece compared with transformers' own layers.

A piece is fed what transformers computes before it. So a difference shows where it arises, and rounding before a router
cannot let it choose other experts. One after the other the pieces are the whole graph. What is compared are lengths, of
the difference and of what a block adds for one token: then an expert that is wrong shows beside a large residual.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime
import torch
from onnx_ir import tensor_adapters
from optimum.exporters.error_utils import AtolError, OutputMatchError, ShapeError
from tqdm import tqdm
from transformers import PreTrainedModel

from optimum_lfm2 import compat
from optimum_lfm2.caches import LOGITS_TO_KEEP, CacheTensor, unflatten
from optimum_lfm2.export.loading import materialize_buffers
from optimum_lfm2.export.reference import fill_caches, row_of, visible_rows
from optimum_lfm2.export.streamed import StandIns, streamed


# By name in the graph: for a norm what it gives and takes, for outputs what they are. Not a number: not compared.
Values = dict[str, torch.Tensor]

NORMS = ("operator_norm", "ffn_norm", "embedding_norm")
WEIGHT = ".weight"


@dataclass(frozen=True)
class Cut:
    """A norm of the graph, between two pieces: its module's name, what it gives, and the residual that it takes."""

    name: str
    normed: ir.Value
    hidden: ir.Value

    @property
    def values(self) -> list[ir.Value]:
        return [self.normed, self.hidden]


def validate(config: Any, model: PreTrainedModel, path: Path, atol: float | None, inputs: Mapping[str, Any]) -> None:
    """Compare every piece of a file with transformers, on the visible tokens of `inputs`.

    Args:
        config: the `OnnxConfig` of the export, which has its weights.
        model: transformers' model; its own weights are not read.
        atol: the largest `relative_error` allowed; None: the configuration's.
        inputs: what `config.generate_dummy_inputs` gives.

    Raises:
        AtolError, ShapeError, OutputMatchError: as Optimum's own validation does.
    """
    whole = ir.load(path)
    graph = whole.graph
    if (names := [value.name for value in graph.outputs]) != list(config.outputs):
        raise OutputMatchError(f"The graph's outputs are {', '.join(names)}, not {', '.join(config.outputs)}.")
    cuts = list(find_cuts(graph))
    feeds = {name: inputs[name] for name in ("input_ids", "attention_mask", LOGITS_TO_KEEP) if name in inputs}
    if config.use_past_in_inputs:
        feeds |= config.flatten_output_collection_property("past_key_values", inputs["past_key_values"])
    with tqdm(total=2 * len(cuts) + 1, desc="Comparing layers", unit="layer", disable=None, leave=False) as bar:
        gold = compute_gold(config, model, cuts, inputs, bar)
        scales = gold | {
            after.hidden.name: gold[after.hidden.name] - gold[before.hidden.name] for before, after in pairwise(cuts)
        }
        labels = {cut.hidden.name: f"{cut.name}.input" for cut in cuts} | {cut.normed.name: cut.name for cut in cuts}
        precision = torch.finfo(model.dtype).eps
        residuals = {cut.hidden.name for cut in cuts}
        axes = {tensor.present: 2 for tensor in config.cache_tensors}
        differences = {}
        for piece in pieces(graph, cuts, config.cache_tensors):
            part = ir.Model(piece, ir_version=whole.ir_version)
            for name, values in run(part, path.parent, feeds, gold, model.dtype).items():
                rounding = gold[name] * (precision if name in residuals else 0)
                error = relative_error(values - gold[name], scales[name], rounding, axes.get(name, 1))
                differences[labels.get(name, name)] = error
            bar.update()
    tolerance = config.ATOL_FOR_VALIDATION if atol is None else atol
    if any(not difference <= tolerance for difference in differences.values()):
        lines = "\n".join(f"- {name}: max diff = {difference}" for name, difference in differences.items())
        raise AtolError(f"The largest differences from transformers, where {tolerance} is allowed:\n{lines}")


def relative_error(difference: torch.Tensor, scale: torch.Tensor, rounding: torch.Tensor, axis: int) -> float:
    """By how much of the scale the difference exceeds the rounding: lengths of a token's vectors; the largest of all.

    All are (batch_size, ...), tokens along `axis`. Where the scale is not a number, nothing is compared.
    """
    lengths = [values.movedim(axis, 1).flatten(2).norm(dim=2) for values in (difference, scale, rounding)]
    known = ~lengths[1].isnan()
    error, length, least = (values[known] for values in lengths)
    return float(((error - least).clamp(min=0) / length.clamp(min=torch.finfo(torch.float32).tiny)).max())


def find_cuts(graph: ir.Graph) -> Iterator[Cut]:
    """The norms between the blocks, in order; those of single heads are not among them."""
    for node in graph:
        if "SimplifiedLayerNormalization" in node.op_type:
            weight = next(value.name for value in node.inputs if value.is_initializer())
            name = weight.removesuffix(WEIGHT)
            if name.endswith(NORMS):
                yield Cut(name, node.outputs[0], node.inputs[0] if len(node.outputs) == 1 else node.outputs[3])


@torch.no_grad()
def compute_gold(config: Any, model: Any, cuts: Sequence[Cut], inputs: Mapping[str, Any], bar: tqdm) -> Values:
    """What transformers computes of each value at a cut and of each output: one row at a time, without padding.

    It computes in float32, and what a norm gives is rounded to the file's dtype, so that a router sees the same.
    """
    ids, mask, past = inputs["input_ids"], inputs["attention_mask"], inputs.get("past_key_values")
    batch, sequence = ids.shape
    past_length = mask.shape[1] - sequence
    width = model.config.hidden_size
    shapes: dict[str, Any] = {value.name: (batch, sequence, width) for cut in cuts for value in cut.values}
    shapes |= _output_shapes(config, batch, sequence, past_length)
    gold = {name: torch.full(shape, torch.nan) for name, shape in shapes.items()}
    output, *presents = config.outputs
    materialize_buffers(model)
    weights = StandIns(model, config.weights, config.scheme)
    kinds = config.member.kinds(model.config)
    for row, seen, new in visible_rows(mask, past_length):
        before = None if past is None else [tuple(x.float() for x in layer) for layer in row_of(past, kinds, row, seen)]
        with streamed(model, weights), _recorded(model, cuts, gold, (row, new), bar):
            cache = compat.hybrid_cache(model, before if len(seen) else None)
            gold[output][row, new] = compat.call(model, ids[row, new][None], cache, len(seen))[0].float()
        if presents:
            present = unflatten([gold[name] for name in presents], config.cache_tensors)
            own = compat.hybrid_cache_layers(cache)
            fill_caches(present, own, kinds, row, past_length + new)
    return gold


def _output_shapes(config: Any, batch: int, sequence: int, past: int) -> dict[str, tuple[int, ...]]:
    sizes = {"num_logits": sequence}
    shapes = {}
    for name, axes in config.output_shapes().items():
        numbers = [axis if isinstance(axis, int) else sizes.get(axis, sequence) for axis in axes]
        shapes[name] = (batch, *numbers[1:])
    for tensor in config.cache_tensors if config.use_past else ():
        if tensor.grows:
            batch_, heads, _, width = shapes[tensor.present]
            shapes[tensor.present] = (batch_, heads, past + sequence, width)
    return shapes


def _recorded(model: Any, cuts: Sequence[Cut], gold: Values, where: tuple[int, torch.Tensor], bar: tqdm) -> ExitStack:
    """A context in which `model` writes what its norms take and give to `gold`, at a row and its tokens."""
    stack = ExitStack()
    for cut in cuts:

        def record(module: Any, taken: tuple, given: torch.Tensor, cut: Cut = cut) -> torch.Tensor:
            given = given.to(model.dtype).float()
            for value in cut.values:
                gold[value.name][where] = given[0] if value is cut.normed else taken[0][0]
            bar.update()
            return given

        stack.callback(model.get_submodule(cut.name).register_forward_hook(record).remove)
    return stack


def pieces(graph: ir.Graph, cuts: Sequence[Cut], caches: Sequence[CacheTensor]) -> Iterator[ir.Graph]:
    """The graph from its inputs to the first cut, from each cut to the next, and from the last to its first output."""
    for before, after in zip([None, *cuts], [*cuts, None], strict=True):
        inputs = [*graph.inputs, *(before.values if before else ())]
        outputs = after.values if after else [graph.outputs[0]]
        if after and after.name.endswith("ffn_norm"):
            layer = int(after.name.split(".")[-2])
            names = [tensor.present for tensor in caches if tensor.layer == layer]
            outputs = [*outputs, *(value for value in graph.outputs if value.name in names)]
        yield ir.convenience.extract(graph, inputs, outputs)


def run(piece: ir.Model, folder: Path, feeds: Values, gold: Values, dtype: torch.dtype) -> Values:
    """The outputs of a piece, in float32 and the shapes of the gold, which is also what it is fed at a cut, as `dtype`.

    Args:
        folder: where the file of its weights lies.
        feeds: the whole graph's inputs.
    """
    feeds = dict(feeds)
    for value in piece.graph.inputs:
        if value.name in gold:
            value.shape = ir.Shape((None, gold[value.name].shape[-1]))
            value.type = ir.TensorType(tensor_adapters.from_torch_dtype(dtype))
            feeds[value.name] = gold[value.name].flatten(0, 1).nan_to_num().to(dtype)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    session = onnxruntime.InferenceSession(
        ir.to_proto(piece).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [value.name for value in session.get_outputs()]
    results = session.run(names, {value.name: feeds[value.name].numpy() for value in session.get_inputs()})
    values = {name: torch.from_numpy(result).float() for name, result in zip(names, results, strict=True)}
    for name, result in values.items():
        if result.numel() != gold[name].numel():
            raise ShapeError(f"{name} has the shape {tuple(result.shape)}, not {tuple(gold[name].shape)}.")
    return {name: result.reshape(gold[name].shape) for name, result in values.items()}
