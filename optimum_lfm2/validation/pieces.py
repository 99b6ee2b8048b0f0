"""Cut an exported graph at its norms, so that each piece can run and be compared alone.

The pieces in order make up the whole graph. Norms are good places to cut: transformers has a module for each norm,
whose input and output a hook can record.
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


# Values by their names in the graph, float32. Those of masked tokens are NaN, and are not compared.
Values = dict[str, torch.Tensor]

WEIGHT = ".weight"


@dataclass(frozen=True)
class Cut:
    """A norm between two pieces.

    Attributes:
        name: the name of the norm's module in transformers' model.
        layers: the layers whose mixers lie between the cut before this one and this one.
        normed: the output of the norm, (batch_size, sequence_length, hidden_size).
        hidden: its input, the residual stream, of the same shape.
    """

    name: str
    layers: tuple[int, ...]
    normed: ir.Value
    hidden: ir.Value

    @property
    def values(self) -> list[ir.Value]:
        """Both values, which the next piece takes as inputs."""
        return [self.normed, self.hidden]


def find_cuts(graph: ir.Graph, norms: Mapping[str, tuple[int, ...]]) -> list[Cut]:
    """Find the norms at which a graph is cut.

    Args:
        graph: the exported graph.
        norms: the names of their modules, in order, each with `Cut.layers`.

    Raises:
        Lfm2Error: the graph lacks one of them, or has them in another order.
    """
    cuts = []
    for node in graph:
        if "SimplifiedLayerNormalization" in node.op_type:
            weight = next((value.name for value in node.inputs if value is not None and value.is_initializer()), "")
            if (name := weight.removesuffix(WEIGHT)) in norms:
                hidden = node.inputs[0] if len(node.outputs) == 1 else node.outputs[3]
                cuts.append(Cut(name, norms[name], node.outputs[0], hidden))
    if [cut.name for cut in cuts] != list(norms):
        missing = sorted(set(norms) - {cut.name for cut in cuts}) or ["the order of its norms"]
        raise Lfm2Error(f"The graph lacks {missing[0]}, so it cannot be compared with transformers.")
    return cuts


def split(graph: ir.Graph, cuts: Sequence[Cut], caches: Sequence[CacheTensor]) -> Iterator[ir.Graph]:
    """Yield the pieces in order: from the inputs to the first cut, between cuts, from the last cut to the first output.

    The piece with a layer's mixer also has the layer's present caches as outputs, and the columns that its states gain.

    Args:
        graph: the exported graph. It stays as it is.
        cuts: the cuts in order.
        caches: the cache tensors of the graph.
    """
    for before, after in zip([None, *cuts], [*cuts, None], strict=True):
        inputs = [*graph.inputs, *(before.values if before else ())]
        outputs = after.values if after else [graph.outputs[0]]
        if after and after.layers:
            own = [tensor for tensor in caches if tensor.layer in after.layers]
            names = [name for tensor in own for name in (tensor.present, tensor.columns)]
            outputs = [*outputs, *(value for value in graph.outputs if value.name in names)]
        yield ir.convenience.extract(graph, inputs, outputs)


class Piece:
    """A piece of an exported graph in a session of its own.

    Args:
        graph: a graph of `split`.
        model: the whole model, whose IR version the piece gets.
        folder: the folder of the data file.
        fed: values by name. An input of the piece with one of these names gets its width and `dtype`.
        dtype: the float dtype of the file.
        exact: whether quantised operators keep activations in float. Else they round them to 8 bits.

    Raises:
        Lfm2Error: onnxruntime does not load the piece.
    """

    def __init__(
        self, graph: ir.Graph, model: ir.Model, folder: Path, fed: Values, dtype: torch.dtype, exact: bool
    ) -> None:
        for value in graph.inputs:
            if value.name in fed:
                value.shape = ir.Shape((None, None, fed[value.name].shape[-1]))
                value.type = ir.TensorType(tensor_adapters.from_torch_dtype(dtype))
        if exact:
            keep_activations_float(graph)
        self._dtype = dtype
        part = ir.Model(graph, ir_version=model.ir_version)
        self._session = open_session(ir.to_proto(part).SerializeToString(), folder)

    def run(self, feeds: Mapping[str, torch.Tensor], gold: Values) -> Values:
        """Run the piece, and return its outputs in float32 and in the shapes of the gold.

        Args:
            feeds: the inputs of the whole graph.
            gold: transformers' values. The piece gets its inputs at a cut from them, and noise for masked tokens, which
                must change nothing.

        Raises:
            Lfm2Error: the piece fails, or an output has another size than in the gold.
        """
        inputs = {}
        for value in self._session.get_inputs():
            if value.name in gold:
                inputs[value.name] = with_noise(gold[value.name]).to(self._dtype).numpy()
            else:
                inputs[value.name] = feeds[value.name].numpy()
        return outputs_of(self._session, inputs, gold)


def with_noise(values: torch.Tensor) -> torch.Tensor:
    """Replace NaN, which stands for values of masked tokens, by random numbers of the size of the others.

    With zeros there a graph that reads masked tokens would look right.
    """
    masked = values.isnan()
    noise = torch.randn(values.shape, generator=torch.Generator().manual_seed(0))
    return torch.where(masked, noise * values[~masked].std(), values)


def keep_activations_float(graph: ir.Graph) -> None:
    """Let quantised operators keep activations in float, where they would round them to 8 bits."""
    for node in graph:
        node.attributes.pop("accuracy_level", None)


def cpu_session(model: Path | bytes, entries: Mapping[str, str]) -> onnxruntime.InferenceSession:
    """Open a session on the CPU that logs nothing but errors. onnxruntime raises what it cannot load.

    Args:
        model: the path of a model, or its bytes.
        entries: entries of the session's configuration.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    for name, value in entries.items():
        options.add_session_config_entry(name, value)
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def open_session(model: Path | bytes, folder: Path, prepack: bool = True) -> onnxruntime.InferenceSession:
    """Open a session on the CPU.

    Args:
        model: the path of a model, or its bytes.
        folder: the folder of the data file.
        prepack: whether kernels may rearrange weights. They keep a second copy of what they rearrange.

    Raises:
        Lfm2Error: onnxruntime does not load the model.
    """
    entries = {}
    if isinstance(model, bytes):
        entries["session.model_external_initializers_file_folder_path"] = str(folder)
    if not prepack:
        entries["session.disable_prepacking"] = "1"
    try:
        return cpu_session(model, entries)
    except Exception as error:  # onnxruntime's errors have no common class
        raise Lfm2Error(f"The file is wrong and was not kept: it does not load. {first_line(error)}") from error


def outputs_of(session: onnxruntime.InferenceSession, inputs: Mapping[str, object], gold: Values) -> Values:
    """Run a session, and return its outputs by name in float32 and in the shapes of the gold.

    Raises:
        Lfm2Error: the session fails, or an output has another size than in the gold.
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
