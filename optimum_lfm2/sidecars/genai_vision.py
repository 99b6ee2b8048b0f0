"""What onnxruntime-genai (0.18) needs of LFM2-VL besides the three files that other runtimes read.

Its embedding takes the features of pictures too, so a second graph of it lies beside those files, over the same
weights. Its image processor has settings of its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir
from transformers import PretrainedConfig

from optimum_lfm2.errors import read_object
from optimum_lfm2.file_names import DECODER, GENAI_EMBEDDING, ONNX_FOLDER, VISION
from optimum_lfm2.graph.editing import constant
from optimum_lfm2.loading.processor import PREPROCESSOR


GENAI_PROCESSOR = "genai_processor_config.json"
FEATURES = "image_features"
# PIL's numbers of filters, as a preprocessor_config.json has them.
FILTERS = {0: "NEAREST", 1: "LANCZOS", 2: "LINEAR", 3: "CUBIC"}


def write_pictures(folder: Path, decoder: Path, embedding: Path, config: PretrainedConfig) -> dict[str, Any] | None:
    """Write the embedding's second graph, and the settings of onnxruntime-genai's image processor.

    Args:
        folder: the folder of `genai_config.json` and `preprocessor_config.json`. The graph goes to its subfolder of
            ONNX files, where its weights lie or will lie.
        decoder, embedding: the files of these parts.
        config: the configuration of the whole model.

    Returns:
        The sections of `genai_config.json` for the parts other than the decoder. None where onnxruntime-genai lacks the
        filter that resizes the model's pictures. Nothing is written then.
    """
    settings = read_object(folder / PREPROCESSOR)
    if settings["resample"] not in FILTERS:
        return None
    text = json.dumps(processor_settings(settings), indent=2) + "\n"
    (folder / GENAI_PROCESSOR).write_text(text, encoding="utf-8")
    model = ir.load(embedding)
    take_features(model.graph, config.image_token_id)
    ir.save(model, folder / ONNX_FOLDER / GENAI_EMBEDDING)
    options = {"log_id": "onnxruntime-genai", "provider_options": []}
    return {
        "image_token_id": config.image_token_id,
        "embedding": {
            "filename": f"{ONNX_FOLDER}/{GENAI_EMBEDDING}",
            "session_options": options,
            "inputs": {"input_ids": "input_ids", FEATURES: FEATURES},
            "outputs": {"inputs_embeds": "inputs_embeds"},
        },
        "vision": {
            "filename": f"{ONNX_FOLDER}/{decoder.name.replace(DECODER, VISION)}",
            "session_options": options,
            "config_filename": GENAI_PROCESSOR,
            "patch_size": settings["encoder_patch_size"],
            "spatial_merge_size": settings["downsample_factor"],
            "max_num_patches": 0,  # as many as the longest picture has
            "inputs": {
                "pixel_values": "pixel_values",
                "attention_mask": "pixel_attention_mask",
                "image_sizes": "spatial_shapes",
            },
            "outputs": {FEATURES: FEATURES},
        },
    }


def processor_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of onnxruntime-genai's image processor for those of transformers' processor, all of them."""
    patch, factor = settings["encoder_patch_size"], settings["downsample_factor"]
    pixels = (patch * factor) ** 2  # of a picture token
    resize = {
        "height": settings["tile_size"],
        "width": settings["tile_size"],
        "interpolation": FILTERS[settings["resample"]],
        "smart_resize": 1,
        "min_pixels": settings["min_image_tokens"] * pixels,
        "max_pixels": settings["max_image_tokens"] * pixels,
        "patch_size": patch,
        "merge_size": factor,
    }
    steps: list[tuple[str, str, dict[str, Any]]] = [
        ("decode_image", "DecodeImage", {"color_space": "RGB"}),
        ("resize", "Resize", resize),
        ("rescale", "Rescale", {"rescale_factor": settings["rescale_factor"]}),
        ("normalize", "Normalize", {name: _listed(settings[f"image_{name}"]) for name in ("mean", "std")}),
        ("to_channel_first", "Permute3D", {"dims": [2, 0, 1]}),
        ("image_sizes", "PixtralImageSizes", {}),
    ]
    operations = [{"name": name, "type": kind, **({"attrs": attrs} if attrs else {})} for name, kind, attrs in steps]
    transforms = [{"operation": operation} for operation in operations]
    return {"processor": {"name": "lfm2_vl_image_processor", "transforms": transforms}}


def _listed(value: float | list[float]) -> list[float]:
    return value if isinstance(value, list) else [value] * 3


def take_features(graph: ir.Graph, image_token: int) -> None:
    """Give an embedding the input `image_features`, float32 (picture tokens, hidden_size).

    The features take the places of picture tokens in order. A picture token without a feature, such as one that the
    model generates, keeps its own embedding.
    """
    (ids,), (embeds,) = graph.inputs, graph.outputs
    hidden = int(embeds.shape[2])  # type: ignore[arg-type]  # a number, as the export declares it
    features = ir.Value(
        name=FEATURES, shape=ir.Shape(["num_image_tokens", hidden]), type=ir.TensorType(ir.DataType.FLOAT)
    )
    tape = ir.tape.Tape(graph)
    zero, one = constant(tape, 0), constant(tape, 1)
    flat = tape.op("Reshape", [ids, constant(tape, [-1])])
    rows = tape.op("Reshape", [embeds, constant(tape, [-1, hidden])])
    count = tape.op("Squeeze", [tape.op("Shape", [features], {"start": 0, "end": 1}), constant(tape, [0])])
    length = tape.op("Squeeze", [tape.op("Shape", [flat]), constant(tape, [0])])
    pictured = tape.op("Equal", [flat, constant(tape, image_token)])
    order = tape.op("Sub", [tape.op("CumSum", [tape.op("Cast", [pictured], {"to": ir.DataType.INT64}), zero]), one])
    own = tape.op("Add", [tape.op("Range", [zero, length, one]), count])
    taken = tape.op("And", [pictured, tape.op("Less", [order, count])])
    index = tape.op("Where", [taken, order, own])
    chosen = tape.op("Gather", [tape.op("Concat", [features, rows], {"axis": 0}), index], {"axis": 0})
    result = tape.op("Reshape", [chosen, tape.op("Shape", [embeds])])
    result.name, embeds.name = embeds.name, f"{embeds.name}.text"
    result.type, result.shape = embeds.type, embeds.shape
    graph.inputs.append(features)
    graph.outputs[0] = result
