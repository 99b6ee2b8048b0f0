"""The names of ONNX files."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


# As Transformers.js reads them. A precision's suffix follows each, such as `_q4`.
ONNX_FOLDER = "onnx"
MODEL = "model"  # of a model in one file
# Of a model that takes pictures.
VISION, EMBEDDING, DECODER = "vision_encoder", "embed_tokens", "decoder_model_merged"
# Second graphs for onnxruntime-genai, over the weights of other files. Where several names end in `.onnx`, Optimum may
# take any of them for the model, so these do not.
GENAI_DECODER, GENAI_EMBEDDING = "genai_decoder.onnx_graph", "genai_embedding.onnx_graph"
# `model_kv8.onnx` is a copy of the graph `model.onnx` with an int8 KV cache. Both files share the same weights.
QUANTIZED_CACHE = "_kv8"


def main_files(files: Iterable[Path]) -> list[Path]:
    """Return the sorted ONNX files that a folder's name can stand for.

    A user asks for a graph with an int8 KV cache by its file name, so it is left out where another one is left.
    """
    files = sorted(files)
    return [file for file in files if not file.stem.endswith(QUANTIZED_CACHE)] or files
