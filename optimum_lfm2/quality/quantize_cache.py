"""The 8-bit KV cache: write a second graph beside an exported one, with int8 keys and values over the same weights.

The int8 cache takes a quarter of the memory of a float32 cache, and decoding reads a quarter of the bytes. Each channel
of a layer's keys, and of its values, has one scale: value = integer * scale. A calibration text decides the scales.
`GroupQueryAttention` computes with such a cache where its attributes say `PER_CHANNEL`:
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.GroupQueryAttention
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

from optimum_lfm2.caches import KEY, CacheTensor
from optimum_lfm2.errors import Lfm2Error, first_line
from optimum_lfm2.export.staging import terminable
from optimum_lfm2.file_names import QUANTIZED_CACHE
from optimum_lfm2.graph.editing import add_initializer, graph_cache_tensors
from optimum_lfm2.metadata import COMPARED, DIFFERENCE, QUALITY, TEXT
from optimum_lfm2.quality.evaluate import Quality, find_tokenizer, measure, read_chunks
from optimum_lfm2.quality.scoring import EMBEDS, OnnxModel, onnx_file
from optimum_lfm2.runtime.files import FileIdentity


HEADROOM = 1.25  # another text may hold larger values, and clipping them costs much (figures: docs/quantization.md)
LARGEST = 127
LEAST_CHUNKS = 4
NEEDED = version.parse("1.27")  # onnxruntime 1.27 is the first release whose CPU kernel takes an int8 cache

ATTENTION = "GroupQueryAttention"
PAST_INPUTS, PRESENT_OUTPUTS, SCALE_INPUTS = slice(3, 5), slice(1, 3), (12, 13)


def quantize_cache(
    model: str | Path, text: str | Path, chunks: int = 32, length: int = 512
) -> tuple[Path, Path, Quality]:
    """Write `{name}_kv8.onnx` beside `{name}.onnx`: the same model with an int8 KV cache.

    Args:
        model: an ONNX file whose KV cache is float, or a folder with one.
        text: a text file in UTF-8, similar to what the model will read. Every other chunk decides the scales. On the
            other chunks the new file is compared with the old one.
        chunks: the largest number of chunks to read; four are the least.
        length: the tokens of a chunk.

    Returns:
        The source file, the new file, and how far the new file's predictions are from the source's.

    Raises:
        Lfm2Error: the model or the text cannot be used. Nothing is written then.
    """
    if version.parse(installed := onnxruntime.__version__) < NEEDED:
        raise Lfm2Error(f"onnxruntime {installed} cannot run an 8-bit KV cache. Install {NEEDED} or later.")
    source = _source(Path(model))
    quantized = _load(source)
    if EMBEDS in (value.name for value in quantized.graph.inputs):
        raise Lfm2Error(f"{source} is the decoder of a model that takes pictures too. Its KV cache stays in float.")
    found = FileIdentity.of(source)
    nodes = _attention_nodes(quantized.graph, source)
    _check_weights(quantized.graph)
    pieces = _read_text(text, source, chunks, length)
    gold = OnnxModel(source)
    target = source.with_name(f"{source.stem}{QUANTIZED_CACHE}.onnx")
    # The temporary file is in the same folder, since a graph finds its weights by a path relative to its own.
    written = source.with_name(f".{target.stem}.{secrets.token_hex(4)}.onnx")
    with terminable():
        try:
            written.touch()  # a folder that cannot be written to fails before the work
            next(gold(pieces[:1]))  # so does a graph that cannot be compared
            limits = _calibrate(gold, [tensor for pair in nodes.values() for tensor in pair], pieces[::2])
            for node, pair in nodes.items():
                _quantize(node, [_scales(limits[tensor.present]) for tensor in pair], quantized.graph)
            for note in (DIFFERENCE, COMPARED, QUALITY, TEXT):  # these were measured on the source file
                quantized.metadata_props.pop(note, None)
            ir.save(quantized, written)
            quality = measure(OnnxModel(written), gold, pieces[1::2])
            if FileIdentity.of(source) != found:
                raise Lfm2Error(
                    f"{source} was written anew meanwhile, and the 8-bit cache is of the old one. Run again."
                )
            written.replace(target)
        except OSError as error:
            raise Lfm2Error(f"{target} cannot be written ({error}). Copy the export to a folder of your own.") from None
        finally:
            written.unlink(missing_ok=True)
    return source, target, quality


def _source(path: Path) -> Path:
    if (file := onnx_file(path)) is None:
        raise Lfm2Error(f"{path} holds no ONNX file. Give an exported folder or an .onnx file.")
    return file


def _load(path: Path) -> ir.Model:
    try:
        return ir.load(path)
    except Exception as error:  # the errors of protobuf and of onnx-ir have no common class
        raise Lfm2Error(f"{path} cannot be loaded ({first_line(error)}). Export it again.") from None


def _read_text(text: str | Path, source: Path, chunks: int, length: int) -> list[torch.Tensor]:
    if chunks < LEAST_CHUNKS:
        raise Lfm2Error(f"{chunks} chunks are too few. Ask for {LEAST_CHUNKS} or more.")
    pieces = read_chunks(text, find_tokenizer(source), chunks, length)
    if len(pieces) < LEAST_CHUNKS:
        raise Lfm2Error(
            f"{text} has {len(pieces)} chunks of {length} tokens, and {LEAST_CHUNKS} are needed. "
            "Give more text or shorter chunks."
        )
    return pieces


def _check_weights(graph: ir.Graph) -> None:
    """Refuse weights that are symbolic links, since a second graph could not read them.

    The Hub's cache consists of such links. onnxruntime 1.32 reads them from a graph that is itself a link beside them,
    but not from a regular file, as the new graph would be (tests/test_claims.py).

    Raises:
        Lfm2Error: a weight file is a link.
    """
    for value in graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) and Path(tensor.path).is_symlink():
            raise Lfm2Error(
                f"{tensor.path} is a symbolic link, as in the Hub's cache, and onnxruntime does not follow it. "
                "Download the model with hf download --local-dir, and give that folder."
            )


def _attention_nodes(graph: ir.Graph, path: Path) -> dict[ir.Node, tuple[CacheTensor, CacheTensor]]:
    """Map each attention node to its cache tensors: keys and values.

    Raises:
        Lfm2Error: the graph has no KV cache, or one in int8, or one that `GroupQueryAttention` does not read and
            write directly.
    """
    caches = graph_cache_tensors(graph)
    growing = sorted((tensor for tensor in caches if tensor.grows), key=lambda tensor: (tensor.layer, tensor.role))
    if not growing:
        raise Lfm2Error(f"{path} has no KV cache among its inputs. Give an export of a task with past.")
    types = {value.name: value.dtype for value in graph.inputs}
    if types[growing[0].past] == ir.DataType.INT8:
        raise Lfm2Error(f"{path} has an 8-bit KV cache already. Give the file that it was made of.")
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
            f"{path} does not pass {past} directly to {ATTENTION}, so its KV cache cannot be quantised. "
            "Give an export by this package of a model whose head width is a multiple of 8."
        )
    return nodes


def _calibrate(
    model: OnnxModel, tensors: Sequence[CacheTensor], pieces: Sequence[torch.Tensor]
) -> dict[str, np.ndarray]:
    """Find the largest magnitude of each channel on a text.

    Returns:
        For each cache output's name, float32 (kv_heads, head_dim).

    Raises:
        Lfm2Error: a value is not finite.
    """
    names = [tensor.present for tensor in tensors]
    limits: dict[str, np.ndarray] = {}
    for ids in tqdm(pieces, desc="Calibrating", unit="chunk", disable=None, leave=False):
        for tensor, (values,) in zip(tensors, model.run(names, ids), strict=True):
            values = np.abs(values.astype(np.float32))
            if tensor.role == KEY:
                # RoPE rotates channels i and i + head_dim / 2 into one another. Their radius bounds both of them at
                # every position.
                values = np.tile(np.hypot(*np.split(values, 2, axis=-1)), 2)
            limits[tensor.present] = np.maximum(values.max(1), limits.get(tensor.present, 0.0))
    if wrong := [name for name, limit in limits.items() if not np.isfinite(limit).all()]:
        raise Lfm2Error(f"{wrong[0]} has values that are not finite on this text. Export the model in fp32.")
    return limits


def _scales(limits: np.ndarray) -> np.ndarray:
    """Compute the scale of each channel, float32 (kv_heads * head_dim).

    A channel that stayed near 0 on the text gets a small scale, so that no scale is 0.
    """
    least = float(limits.max()) / 1000 or 1.0
    return (np.maximum(limits, least) * HEADROOM / LARGEST).astype(np.float32).ravel()


def _quantize(node: ir.Node, scales: Sequence[np.ndarray], graph: ir.Graph) -> None:
    """Make an attention node read and write int8, with the given scales of keys and of values."""
    for value in (*node.inputs[PAST_INPUTS], *node.outputs[PRESENT_OUTPUTS]):
        value.type = ir.TensorType(ir.DataType.INT8)  # type: ignore[union-attr]
    node.resize_inputs(max(len(node.inputs), max(SCALE_INPUTS) + 1))
    for position, values, present in zip(SCALE_INPUTS, scales, node.outputs[PRESENT_OUTPUTS], strict=True):
        node.replace_input_with(position, add_initializer(graph, ir.tensor(values, name=f"{present.name}.scale")))
    node.attributes.add(ir.AttrString("k_quant_type", "PER_CHANNEL"))
    node.attributes.add(ir.AttrString("v_quant_type", "PER_CHANNEL"))
    node.attributes.add(ir.AttrInt64("kv_cache_bit_width", 8))
