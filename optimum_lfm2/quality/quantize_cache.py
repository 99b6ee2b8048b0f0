"""Keys and values in 8 bits: a second graph beside an exported one, over the same weights.

A quarter of the memory of a cache in float32, and of what decoding reads of it. Each channel of a layer's keys and
values has one scale, which a text decides: integers times scale are the values, as `GroupQueryAttention` does it
(onnxruntime's docs/ContribOperators.md, `PER_CHANNEL`).
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from packaging import version
from tqdm import tqdm

from optimum_lfm2.caches import QUANTIZED_CACHE, CacheTensor
from optimum_lfm2.errors import Lfm2Error, first_line
from optimum_lfm2.export.staging import terminable
from optimum_lfm2.graph.editing import add_initializer, graph_cache_tensors
from optimum_lfm2.metadata import COMPARED, DIFFERENCE, QUALITY, TEXT
from optimum_lfm2.quality.evaluate import Quality, find_tokenizer, measure, read_chunks
from optimum_lfm2.quality.scoring import OnnxModel, onnx_file


HEADROOM = 1.25  # room for what the text did not show: what does not fit is clipped (docs/quantization.md)
LARGEST = 127
LEAST_CHUNKS = 4
NEEDED = version.parse("1.27")  # older releases have no such kernel

ATTENTION = "GroupQueryAttention"
PAST_INPUTS, PRESENT_OUTPUTS, SCALE_INPUTS = slice(3, 5), slice(1, 3), (12, 13)


def quantize_cache(
    model: str | Path, text: str | Path, chunks: int = 32, length: int = 512
) -> tuple[Path, Path, Quality]:
    """Write `{name}_kv8.onnx` beside `{name}.onnx`: the same model, its keys and values int8.

    Args:
        model: an ONNX file whose keys and values are float, or a folder with one.
        text: a file in UTF-8, like what the model will read. Every other chunk decides the scales; the rest tells what
            they cost.
        chunks: how many to read at most; four at least.
        length: tokens of a chunk.

    Returns:
        The file it was made of, the new file, and how far the second is from the first.

    Raises:
        Lfm2Error: for a model or text that cannot be used; then nothing is written.
    """
    if version.parse(installed := onnxruntime.__version__) < NEEDED:
        raise Lfm2Error(f"onnxruntime {installed} cannot run a cache in 8 bits. Install {NEEDED} or later.")
    source = _source(Path(model))
    quantized = _load(source)
    nodes = _attention_nodes(quantized.graph, source)
    _check_weights(quantized.graph)
    pieces = _read_text(text, source, chunks, length)
    gold = OnnxModel(source)
    target = source.with_name(f"{source.stem}{QUANTIZED_CACHE}.onnx")
    written = source.with_name(f".{target.stem}.{secrets.token_hex(4)}.onnx")  # its weights are found from here only
    with terminable():
        try:
            written.touch()  # what cannot be written is told of before the work
            next(gold(pieces[:1]))  # so that a graph which cannot be compared is refused now
            limits = _calibrate(gold, [tensor for pair in nodes.values() for tensor in pair], pieces[::2])
            for node, pair in nodes.items():
                _quantize(node, [_scales(limits[tensor.present]) for tensor in pair], quantized.graph)
            for note in (DIFFERENCE, COMPARED, QUALITY, TEXT):  # of the file that this one is made of
                quantized.metadata_props.pop(note, None)
            ir.save(quantized, written)
            quality = measure(OnnxModel(written), gold, pieces[1::2])
            written.replace(target)
        except OSError as error:
            raise Lfm2Error(f"{target} cannot be written ({error}). Copy the export to a folder of your own.") from None
        finally:
            written.unlink(missing_ok=True)
    return source, target, quality


def _source(path: Path) -> Path:
    file = path if path.is_file() else onnx_file(path)
    if file is None:
        what = "holds no ONNX file" if path.exists() else "does not exist"
        raise Lfm2Error(f"{path} {what}. Give an exported folder, or an .onnx file of it.")
    return file


def _load(path: Path) -> ir.Model:
    try:
        return ir.load(path)
    except Exception as error:  # of protobuf, of onnx-ir: they have no common class
        raise Lfm2Error(f"{path} cannot be loaded ({first_line(error)}). Export it again.") from None


def _read_text(text: str | Path, source: Path, chunks: int, length: int) -> list[torch.Tensor]:
    why = f"{LEAST_CHUNKS} are the least: every other one decides the scales, the rest is compared"
    if chunks < LEAST_CHUNKS:
        raise Lfm2Error(f"{chunks} chunks are too few, {why}.")
    pieces = read_chunks(text, find_tokenizer(source), chunks, length)
    if len(pieces) < LEAST_CHUNKS:
        raise Lfm2Error(
            f"{text} has {len(pieces)} chunks of {length} tokens, and {why}. Give more text or shorter chunks."
        )
    return pieces


def _check_weights(graph: ir.Graph) -> None:
    """Raise `Lfm2Error` for weights that a second graph beside the first could not read: links."""
    for value in graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) and Path(tensor.path).is_symlink():
            raise Lfm2Error(
                f"{tensor.path} is a link, as in the Hub's cache, and onnxruntime follows none. "
                "Download the model with hf download --local-dir, and give that folder."
            )


def _attention_nodes(graph: ir.Graph, path: Path) -> dict[ir.Node, tuple[CacheTensor, CacheTensor]]:
    """The attention of each layer, with its cache tensors of keys and of values.

    Raises:
        Lfm2Error: where keys and values are not float tensors that an attention node alone reads and writes.
    """
    caches = graph_cache_tensors(graph)
    growing = sorted((tensor for tensor in caches if tensor.grows), key=lambda tensor: (tensor.layer, tensor.kind))
    if not growing:
        raise Lfm2Error(f"{path} has no keys and values among its inputs: there is no cache to quantise.")
    types = {value.name: value.dtype for value in graph.inputs}
    if types[growing[0].past] == ir.DataType.INT8:
        raise Lfm2Error(f"{path} has its keys and values in 8 bits already. Give the file that it was made of.")
    pairs = zip(growing[::2], growing[1::2], strict=True)
    layers = {(key.past, value.past, key.present, value.present): (key, value) for key, value in pairs}
    nodes = {}
    for node in graph:
        if node.op_type == ATTENTION:
            names = tuple(value and value.name for value in (*node.inputs[PAST_INPUTS], *node.outputs[PRESENT_OUTPUTS]))
            if names in layers:
                nodes[node] = layers.pop(names)
    if layers:
        past, *_ = min(layers)
        raise Lfm2Error(
            f"{path} does not hand {past} to {ATTENTION} as it is, as this package's exports do where heads have a "
            "width that is a multiple of 8. Its cache cannot be quantised."
        )
    return nodes


def _calibrate(
    model: OnnxModel, tensors: Sequence[CacheTensor], pieces: Sequence[torch.Tensor]
) -> dict[str, np.ndarray]:
    """The largest magnitude of each channel, float32 (kv_heads, head_dim), by the output's name."""
    names = [tensor.present for tensor in tensors]
    limits: dict[str, np.ndarray] = {}
    for ids in tqdm(pieces, desc="Calibrating", unit="chunk", disable=None, leave=False):
        for tensor, (values,) in zip(tensors, model.run(names, ids), strict=True):
            values = np.abs(values.astype(np.float32))
            if tensor.kind == "key":
                # The positions turn channels i and i + head_dim / 2 into one another: their radius is the bound.
                values = np.tile(np.hypot(*np.split(values, 2, axis=-1)), 2)
            limits[tensor.present] = np.maximum(values.max(1), limits.get(tensor.present, 0.0))
    if wrong := [name for name, limit in limits.items() if not np.isfinite(limit).all()]:
        raise Lfm2Error(f"{wrong[0]} holds values that are not finite numbers on this text. Export in fp32.")
    return limits


def _scales(limits: np.ndarray) -> np.ndarray:
    """A scale for each channel, float32 (kv_heads * head_dim); for one that the text never used, a small one."""
    least = float(limits.max()) / 1000 or 1.0
    return (np.maximum(limits, least) * HEADROOM / LARGEST).astype(np.float32).ravel()


def _quantize(node: ir.Node, scales: Sequence[np.ndarray], graph: ir.Graph) -> None:
    """Let an attention node read and write int8, by its scales of keys and of values."""
    for value in (*node.inputs[PAST_INPUTS], *node.outputs[PRESENT_OUTPUTS]):
        value.type = ir.TensorType(ir.DataType.INT8)  # type: ignore[union-attr]
    node.resize_inputs(max(len(node.inputs), max(SCALE_INPUTS) + 1))
    for position, values, present in zip(SCALE_INPUTS, scales, node.outputs[PRESENT_OUTPUTS], strict=True):
        node.replace_input_with(position, add_initializer(graph, ir.tensor(values, name=f"{present.name}.scale")))
    node.attributes.add(ir.AttrString("k_quant_type", "PER_CHANNEL"))
    node.attributes.add(ir.AttrString("v_quant_type", "PER_CHANNEL"))
    node.attributes.add(ir.AttrInt64("kv_cache_bit_width", 8))
