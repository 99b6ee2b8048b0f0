"""Finish the traced file: quantise, declare shapes, and stream the weights in, one or two in memory at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor
from optimum.utils import logging
from tqdm import tqdm

from optimum_lfm2.caches import LOGITS_TO_KEEP
from optimum_lfm2.export.linears import place_linears
from optimum_lfm2.export.quantize import Quantizer
from optimum_lfm2.graph.editing import CONTRIB_DOMAIN, add_initializer, parameter_name, read_parameter
from optimum_lfm2.graph.member import GraphPass
from optimum_lfm2.graph.ops import PLACEHOLDER_DOMAIN
from optimum_lfm2.weights.blocks import Scheme
from optimum_lfm2.weights.coded import what_was_rounded


logger = logging.get_logger(__name__)

# Small tensors stay in model.onnx: onnxruntime-web reads shapes and axes from there alone.
EXTERNAL_FROM_BYTES = 1024
IR_VERSION = 10
# Threads that read, convert and write float weights. To quantise a weight takes all cores by itself.
WRITERS = 2
IN_FLIGHT = 300 * 2**20  # bytes of the weights that they hold together, as long as one is not larger by itself


def bind(
    path: Path,
    weights: Mapping[str, torch.Tensor],
    shapes: Mapping[str, Sequence[int | str] | None],
    metadata: Mapping[str, str],
    scheme: Scheme | None = None,
    logits_default: bool = True,
    passes: Sequence[GraphPass] = (),
) -> None:
    """Turn a traced file with placeholders into a complete model with its weights in one `{name}_data` file.

    Args:
        path: the traced file. The complete model replaces it.
        weights: each parameter by its name in the checkpoint. Tied names share one tensor.
        shapes: the shape of each input and output, with symbols for the axes that vary. None declares no shape.
        metadata: entries for the file's metadata.
        scheme: how the linear layers and the embedding are quantised. None keeps every weight as it is.
        logits_default: whether `num_logits_to_keep` gets the default 0, so that a caller may leave it out.
        passes: passes of the family member (`Member.passes`).

    Raises:
        Lfm2Error: a weight cannot be read or quantised.
    """
    model = ir.load(path)
    views: dict[ir.Value, str] = {}
    if scheme is not None:
        quantizer = Quantizer(model.graph, weights, scheme)
        quantizer.run()
        views = quantizer.views
        model.opset_imports[CONTRIB_DOMAIN] = 1
    place_linears(model.graph, weights)
    for finish in passes:
        finish(model.graph, weights, scheme)
    _replace_placeholders(model.graph, weights)
    _leave_out_statistics(model.graph)
    _declare_shapes(model.graph, shapes)
    if logits_default:
        keep_all_logits(model.graph)
    model.metadata_props.update(metadata)
    model.ir_version = IR_VERSION
    model.opset_imports.pop(PLACEHOLDER_DOMAIN, None)
    _save(model, path, views, WRITERS if scheme is None else 1)
    for sentence in what_was_rounded(weights):
        logger.warning(sentence)


def _replace_placeholders(graph: ir.Graph, weights: Mapping[str, torch.Tensor]) -> None:
    for node in list(graph):
        if node.domain != PLACEHOLDER_DOMAIN:
            continue
        placeholder, kernel = node.outputs[0], bool(node.attributes.get_int("kernel"))
        if placeholder.uses():  # that of a placed linear layer's weight has none
            read = partial(_read, weights, placeholder, kernel)
            name = parameter_name(placeholder)
            tensor = ir.LazyTensor(read, dtype=placeholder.dtype, shape=placeholder.shape, name=name)
            placeholder.replace_all_uses_with(add_initializer(graph, tensor))
        graph.remove(node, safe=True)


def _read(weights: Mapping[str, torch.Tensor], placeholder: ir.Value, kernel: bool) -> ir.TensorProtocol:
    weight = read_parameter(weights, placeholder)
    return TorchTensor(weight.flatten(1).T.contiguous() if kernel else weight)


def _leave_out_statistics(graph: ir.Graph) -> None:
    """Leave out two results of norms that nobody reads: the mean and the inverse deviation.

    torch's exporter names every output, and onnxruntime plans for each that has a name.
    """
    for node in graph:
        if node.op_type == "SkipSimplifiedLayerNormalization":
            for statistic in node.outputs[1:3]:
                statistic.name = ""


def _declare_shapes(graph: ir.Graph, shapes: Mapping[str, Sequence[int | str] | None]) -> None:
    """Declare numbers for the axes that do not vary. Clients build empty caches from them."""
    for value in (*graph.inputs, *graph.outputs):
        shape = shapes[value.name]
        value.shape = None if shape is None else ir.Shape(shape)


def keep_all_logits(graph: ir.Graph) -> None:
    """Give `num_logits_to_keep` the default 0, which means all. A loop that does not feed it still runs."""
    for value in graph.inputs:
        if value.name == LOGITS_TO_KEEP:
            value.const_value = ir.tensor(np.array(0, dtype=np.int64), name=value.name)
            graph.register_initializer(value)


def _save(model: ir.Model, path: Path, views: Mapping[ir.Value, str], writers: int) -> None:
    with tqdm(desc="Writing weights", unit="tensor", disable=None, leave=False) as bar:

        def advance(tensor: ir.TensorProtocol, info: ir.external_data.CallbackInfo) -> None:
            bar.total = info.total
            bar.update()

        # After a fork, the first thread that sets torch's number of threads replaces its pool. New threads do so on
        # their first operation, and two at once fail in torch 2.13 ("Invalid thread pool!"). So this one comes first.
        torch.set_num_threads(torch.get_num_threads())
        ir.external_data.unload_from_model(
            model,
            path.parent,
            f"{path.name}_data",
            size_threshold_bytes=EXTERNAL_FROM_BYTES - 1,
            callback=advance,
            max_workers=writers,
            max_in_flight_bytes=IN_FLIGHT,
        )
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.LazyTensor):  # read now, since onnx-ir would wrap our error in its own
            value.const_value = ir.tensor(value.const_value.numpy(), name=value.name)
    for value, stored in views.items():
        source = model.graph.initializers[stored]
        value.const_value = _view(source.const_value, value)
        model.graph.register_initializer(value)
        if not source.uses():  # onnxruntime warns of what nobody reads
            del model.graph.initializers[stored]
    ir.save(model, path)


def _view(tensor: ir.TensorProtocol, value: ir.Value) -> ir.TensorProtocol:
    """Return a tensor with the shape of `value` over the bytes of a stored one.

    Both point to one place in the data file. onnxruntime maps the file, so the bytes are in memory once.
    """
    if isinstance(tensor, ir.ExternalTensor):
        return ir.ExternalTensor(
            tensor.location,
            tensor.offset,
            tensor.length,
            tensor.dtype,
            shape=value.shape,
            name=value.name,
            base_dir=tensor.base_dir,
        )
    return ir.tensor(tensor.numpy().reshape(value.shape.numpy()), name=value.name)
