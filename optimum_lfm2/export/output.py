"""Refuse an output folder whose own files an export would replace by those of another purpose."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
from transformers.utils import (
    CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)

from optimum_lfm2.errors import Lfm2Error, read_object
from optimum_lfm2.file_names import DECODER, EMBEDDING, ONNX_FOLDER, VISION
from optimum_lfm2.loading.config_check import JS_CONFIG
from optimum_lfm2.metadata import CHECKPOINT


def check_no_checkpoint(output: Path) -> None:
    """Raise `Lfm2Error` for a folder that holds a checkpoint: the exported one, by whatever path, or another."""
    for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME):
        if (output / name).exists():
            raise Lfm2Error(
                f"{output} holds a checkpoint ({name}), whose config.json and tokenizer an export would replace. "
                "Give another folder."
            )


def check_output(output: Path, in_parts: bool) -> None:
    """Refuse a folder that `export onnx` must not write to.

    Args:
        output: the folder. It need not exist.
        in_parts: whether the model is exported in parts, as LFM2-VL is.

    Raises:
        Lfm2Error: it holds a checkpoint, or the graphs of several precisions: their settings in `config.json` and
            `genai_config.json` would be lost.
    """
    check_no_checkpoint(output)
    graphs = sorted(output.glob(f"{ONNX_FOLDER}/*.onnx"))
    config = output / CONFIG_NAME
    if not graphs or not config.is_file() or JS_CONFIG not in read_object(config):
        return
    if in_parts and all(_is_of_export_onnx(graph) for graph in graphs):
        return
    raise Lfm2Error(
        f"{output} holds a folder of optimum-cli export lfm2 ({ONNX_FOLDER}/{graphs[0].name}), whose settings for "
        "Transformers.js and onnxruntime-genai would be lost. Give another folder, or use optimum-cli export lfm2."
    )


def _is_of_export_onnx(graph: Path) -> bool:
    """Return whether `export onnx` may have written a graph of a model in parts."""
    try:
        return graph.stem in (VISION, EMBEDDING, DECODER) and CHECKPOINT not in ir.load(graph).metadata_props
    except Exception:  # the errors of protobuf and of onnx-ir have no common class; such a file may be replaced
        return True
