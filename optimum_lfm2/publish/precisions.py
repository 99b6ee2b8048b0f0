"""The files of a published folder: their names, and what each says of itself."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from optimum_lfm2.caches import CACHE_NAMES, CONV, CacheTensor
from optimum_lfm2.graph.editing import graph_cache_tensors
from optimum_lfm2.metadata import CHECKPOINT, COMPARED, DIFFERENCE, QUALITY, TEXT
from optimum_lfm2.quality.evaluate import Quality


ONNX_FOLDER = "onnx"


@dataclass(frozen=True)
class Precision:
    """One way to store a checkpoint: the file, by the name that Transformers.js looks for, and how it is made."""

    file: str
    dtype: str
    variant: str
    weights: str


PRECISIONS = {
    "fp32": Precision("model.onnx", "fp32", "default", "32 bits"),
    "fp16": Precision("model_fp16.onnx", "fp16", "default", "16 bits"),
    "q8": Precision("model_quantized.onnx", "fp32", "q8", "8 bits"),
    "q4": Precision("model_q4.onnx", "fp32", "q4", "4 bits"),
    "q4f16": Precision("model_q4f16.onnx", "fp16", "q4", "4 bits, computes in 16"),
}
# What a CPU runs best, by its speed: onnxruntime-genai takes the first that is there, and the card's examples too.
PREFERRED = ("q4", "q8", "fp32", "q4f16", "fp16")


@dataclass(frozen=True)
class Published:
    """A file of a published folder.

    Attributes:
        caches: its cache tensors, by the names of its inputs and outputs.
        difference: from transformers, the largest when it was checked.
        compared: what that is a difference of.
        quality: as `optimum_lfm2.quality.evaluate` measured it, None where no text was given.
        text: the name of that text's file.
        checkpoint: the fingerprint of the checkpoint that it was made of.
        rounds_in_experts: whether activations are rounded to 8 bits in experts, for which onnxruntime has to be 1.31.
    """

    precision: str
    path: Path
    caches: list[CacheTensor]
    difference: float
    compared: str
    quality: Quality | None
    text: str
    checkpoint: str
    rounds_in_experts: bool

    @classmethod
    def read(cls, precision: str, path: Path) -> Published:
        model = ir.load(path)
        notes = model.metadata_props
        caches = graph_cache_tensors(model.graph)
        return cls(
            precision,
            path,
            caches,
            float(notes.get(DIFFERENCE, "nan")),
            notes.get(COMPARED, ""),
            Quality(**json.loads(notes[QUALITY])) if QUALITY in notes else None,
            notes.get(TEXT, ""),
            notes.get(CHECKPOINT, ""),
            any(node.op_type == "QMoE" and "accuracy_level" in node.attributes for node in model.graph),
        )

    @property
    def data(self) -> Path:
        """Where its weights lie, if they are not in the file itself."""
        return self.path.with_name(f"{self.path.name}_data")

    @property
    def size(self) -> int:
        """Bytes, with its weights."""
        return sum(path.stat().st_size for path in (self.path, self.data) if path.is_file())

    @property
    def cache_names(self) -> str:
        """The convention of its caches' names; the Hub's where it has no convolution."""
        states = [tensor for tensor in self.caches if tensor.kind == CONV]
        conventions = (
            name for name, (past, _) in CACHE_NAMES.items() if past.format(states[0].layer) == states[0].past
        )
        return next(conventions) if states else "hub"


def annotate(path: Path, notes: Mapping[str, str]) -> None:
    """Add to the metadata of a file, whose weights stay where they are."""
    model = ir.load(path)
    model.metadata_props.update(notes)
    ir.save(model, path)


def published(*folders: Path) -> list[Published]:
    """The files of a published folder, in the order of `PRECISIONS`; where several folders have one, the last."""
    found = []
    for name, precision in PRECISIONS.items():
        paths = [path for folder in folders if (path := folder / ONNX_FOLDER / precision.file).is_file()]
        found += [Published.read(name, paths[-1])] if paths else []
    return found


def preferred(files: Iterable[Published]) -> Published:
    """The file that a CPU runs best."""
    return min(files, key=lambda file: PREFERRED.index(file.precision))
