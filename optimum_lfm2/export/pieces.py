"""An exported graph cut at its norms, so that each piece is run and compared by itself.

One after the other the pieces are the whole graph. A norm is a good place to cut: transformers has a module for each,
whose input and output can be recorded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import onnxruntime
import torch
from onnx_ir import tensor_adapters

from optimum_lfm2.caches import CacheTensor
from optimum_lfm2.errors import Lfm2Error, first_line


# By name in the graph, float32. Not a number where a value belongs to a masked token: it is not compared.
Values = dict[str, torch.Tensor]

WEIGHT = ".weight"


@dataclass(frozen=True)
class Cut:
    """A norm of the graph, between two pieces.

    Attributes:
        name: of the norm's module in transformers' model.
        normed: what the norm gives.
        hidden: the residual stream that it takes.
    """

    name: str
    normed: ir.Value
    hidden: ir.Value

    @property
    def values(self) -> list[ir.Value]:
        return [self.normed, self.hidden]


def find_cuts(graph: ir.Graph, norms: Sequence[str]) -> list[Cut]:
    """The norms between the blocks, in order.

    Args:
        norms: the names of their modules.

    Raises:
        Lfm2Error: for a graph that lacks one of them.
    """
    cuts = []
    for node in graph:
        if "SimplifiedLayerNormalization" in node.op_type:
            weight = next(value.name for value in node.inputs if value is not None and value.is_initializer())
            if (name := weight.removesuffix(WEIGHT)) in norms:
                cuts.append(Cut(name, node.outputs[0], node.inputs[0] if len(node.outputs) == 1 else node.outputs[3]))
    if [cut.name for cut in cuts] != list(norms):
        missing = sorted(set(norms) - {cut.name for cut in cuts}) or ["the order of its norms"]
        raise Lfm2Error(f"The graph lacks {missing[0]}, so it cannot be compared with transformers.")
    return cuts


def split(graph: ir.Graph, cuts: Sequence[Cut], caches: Sequence[CacheTensor]) -> Iterator[ir.Graph]:
    """The graph from its inputs to the first cut, from each cut to the next, and from the last to its first output.

    A cache comes out of the piece that holds its layer's mixer.
    """
    for before, after in zip([None, *cuts], [*cuts, None], strict=True):
        inputs = [*graph.inputs, *(before.values if before else ())]
        outputs = after.values if after else [graph.outputs[0]]
        if after and after.name.endswith("ffn_norm"):
            layer = int(after.name.split(".")[-2])
            names = [tensor.present for tensor in caches if tensor.layer == layer]
            outputs = [*outputs, *(value for value in graph.outputs if value.name in names)]
        yield ir.convenience.extract(graph, inputs, outputs)


class Piece:
    """A piece of a file, ready to run.

    Args:
        graph: one of `split`.
        model: the file's model, for the versions that it declares.
        folder: where the file of the weights lies.
        fed: the values at the cut before it, which become its inputs.
        exact: whether quantised operators compute with activations in float, and not rounded to 8 bits.
    """

    def __init__(
        self, graph: ir.Graph, model: ir.Model, folder: Path, fed: Values, dtype: torch.dtype, exact: bool
    ) -> None:
        for value in graph.inputs:
            if value.name in fed:
                value.shape = ir.Shape((None, fed[value.name].shape[-1]))
                value.type = ir.TensorType(tensor_adapters.from_torch_dtype(dtype))
        if exact:
            for node in graph:
                node.attributes.pop("accuracy_level", None)
        self._dtype = dtype
        part = ir.Model(graph, ir_version=model.ir_version)
        self._session = open_session(ir.to_proto(part).SerializeToString(), folder)

    def run(self, feeds: Mapping[str, torch.Tensor], gold: Values) -> Values:
        """Its outputs in float32, in the shapes of the gold, which also gives its inputs at a cut.

        Args:
            feeds: the whole graph's inputs.

        Raises:
            Lfm2Error: for an output of another size.
        """
        inputs = {}
        for value in self._session.get_inputs():
            if value.name in gold:
                inputs[value.name] = gold[value.name].flatten(0, 1).nan_to_num().to(self._dtype).numpy()
            else:
                inputs[value.name] = feeds[value.name].numpy()
        return outputs_of(self._session, inputs, gold)


def open_session(model: Path | bytes, folder: Path, prepack: bool = True) -> onnxruntime.InferenceSession:
    """A session on the CPU.

    Args:
        model: a file, or its bytes.
        folder: where the file of its weights lies.
        prepack: whether kernels may rearrange the weights, which keeps a copy of them.

    Raises:
        Lfm2Error: for a model that onnxruntime does not load.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if isinstance(model, bytes):
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    if not prepack:
        options.add_session_config_entry("session.disable_prepacking", "1")
    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has a class for each status, and no common one
        raise Lfm2Error(f"The file is wrong and was not kept: it does not load. {first_line(error)}") from error


def outputs_of(session: onnxruntime.InferenceSession, inputs: Mapping[str, object], gold: Values) -> Values:
    """What a session computes, in float32 and the shapes of the gold.

    Raises:
        Lfm2Error: where it fails, or an output has another size.
    """
    names = [value.name for value in session.get_outputs()]
    try:
        results = session.run(names, inputs)
    except Exception as error:  # as above
        raise Lfm2Error(f"The file is wrong and was not kept: it does not run. {first_line(error)}") from error
    values = {name: torch.from_numpy(result).float() for name, result in zip(names, results, strict=True)}
    for name, result in values.items():
        if result.numel() != gold[name].numel():
            raise Lfm2Error(
                f"The file is wrong and was not kept: {name} has the shape {tuple(result.shape)}, not "
                f"{tuple(gold[name].shape)}."
            )
    return {name: result.reshape(gold[name].shape) for name, result in values.items()}
