"""The ONNX files of a published folder: their names, and what their metadata says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir

from optimum_lfm2.caches import CACHE_NAMES, CacheTensor
from optimum_lfm2.errors import Lfm2Error, first_line
from optimum_lfm2.file_names import DECODER, EMBEDDING, MODEL, ONNX_FOLDER, VISION
from optimum_lfm2.graph.editing import graph_cache_tensors
from optimum_lfm2.metadata import CHECKPOINT, COMPARED, DIFFERENCE, QUALITY, TEXT
from optimum_lfm2.quality.evaluate import Quality
from optimum_lfm2.quality.similarity import Similarity
from optimum_lfm2.report import size_with_weights


@dataclass(frozen=True)
class Precision:
    """One way to store a checkpoint.

    Attributes:
        suffix: what follows the name of a file, as Transformers.js looks for it.
        dtype: the dtype of the export, `fp32` or `fp16`.
        variant: the variant of the export, such as `q4`.
        weights: how the model card describes the weights.
        vision: the same for a vision encoder, which never has 4 bits.
        use: what the precision is good for, in words.
        is_dtype: whether Transformers.js (4.3.2) knows the precision as a dtype. Other files it loads by their name.
    """

    suffix: str
    dtype: str
    variant: str
    weights: str
    vision: str
    use: str
    is_dtype: bool = True

    def named(self, part: str) -> str:
        """Return the name of the file that holds a part of a model."""
        return f"{part}{self.suffix}.onnx"

    @property
    def file(self) -> str:
        """The name of the file of a model in one file."""
        return self.named(MODEL)


PRECISIONS = {
    "fp32": Precision("", "fp32", "float", "32 bits", "32 bits", "the results of transformers"),
    "fp16": Precision("_fp16", "fp16", "float", "16 bits", "16 bits", "GPUs"),
    "q8": Precision("_quantized", "fp32", "q8", "8 bits", "8 bits", "CPUs, where quality counts most"),
    "q4": Precision("_q4", "fp32", "q4", "4 bits, embedding and head 8", "8 bits", "CPUs"),
    "q4s": Precision("_q4s", "fp32", "q4s", "4 bits", "8 bits", "CPUs, where size counts most", is_dtype=False),
    "q4f16": Precision(
        "_q4f16",
        "fp16",
        "q4",
        "as q4 in blocks of 32, computes in 16 bits",
        "8 bits, computes in 16",
        "WebGPU and other GPUs",
    ),
}
# What a GGUF file becomes where the user names nothing, by the bits of most of its codes. These have its codes as they
# are.
OF_GGUF = {4: ("q4", "q4f16"), 8: ("q8",)}
# The parts of which a model's files are named. The first is the decoder, which has the caches.
PARTS = (DECODER, EMBEDDING, VISION)
LAYOUTS = ((MODEL,), PARTS)
# What is written where the user names none: one file for each dtype of Transformers.js that we have.
DEFAULT = tuple(name for name, precision in PRECISIONS.items() if precision.is_dtype)


@dataclass(frozen=True)
class Published:
    """An ONNX file of a published folder: a model, or its decoder where the model has parts.

    Attributes:
        precision: a key of `PRECISIONS`.
        path: the file.
        caches: the graph's cache tensors.
        difference: the largest difference from transformers that the check of the file found.
        compared: how that difference was measured, in words.
        quality: what `optimum_lfm2.quality` measured; None where no text was given.
        text: the name of the text file that the quality was measured on.
        checkpoint: the fingerprint of the checkpoint that the file was made of.
        rounds_in_experts: whether `QMoE` rounds its activations to 8 bits. onnxruntime runs such a file from 1.31 on;
            1.30 refuses it (tests/interop/test_node.py).
        parts: the other files of a model in parts, in the order of its layout.
    """

    precision: str
    path: Path
    caches: list[CacheTensor]
    difference: float
    compared: str
    quality: Quality | Similarity | None
    text: str
    checkpoint: str
    rounds_in_experts: bool
    parts: tuple[Published, ...] = ()

    @classmethod
    def read(cls, precision: str, path: Path) -> Published:
        """Read the description of a file from its graph and metadata.

        Raises:
            Lfm2Error: the file is no graph, or its metadata is not what this package writes.
        """
        try:
            model = ir.load(path)
            notes = model.metadata_props
            difference = float(notes.get(DIFFERENCE, "nan"))
            quality = _quality(notes[QUALITY]) if QUALITY in notes else None
        except Exception as error:  # the errors of protobuf and of onnx-ir have no common class
            raise Lfm2Error(
                f"{path} cannot be read ({first_line(error)}). Delete it, and write that precision again."
            ) from error
        caches = graph_cache_tensors(model.graph)
        return cls(
            precision,
            path,
            caches,
            difference,
            notes.get(COMPARED, ""),
            quality,
            notes.get(TEXT, ""),
            notes.get(CHECKPOINT, ""),
            any(node.op_type == "QMoE" and "accuracy_level" in node.attributes for node in model.graph),
        )

    @property
    def size(self) -> int:
        """The bytes of the ONNX file and of its weights, with those of the other parts."""
        return sum(size_with_weights(file.path) for file in self.all)

    @property
    def all(self) -> tuple[Published, ...]:
        """The file itself and those of the other parts."""
        return (self, *self.parts)

    @property
    def by_part(self) -> dict[str, Path] | None:
        """The file of each part by its name. None for a model in one file."""
        return dict(zip(PARTS, (file.path for file in self.all), strict=True)) if self.parts else None

    @property
    def cache_names(self) -> str:
        """The naming convention of its caches: the first one in which all of them have their names."""
        conventions = [tensor.role.conventions(tensor.layer, tensor.past) for tensor in self.caches]
        return next((name for name in CACHE_NAMES if all(name in known for known in conventions)), CACHE_NAMES[0])


def _quality(written: str) -> Quality | Similarity:
    figures = json.loads(written)
    return Similarity(**figures) if "cosine" in figures else Quality(**figures)


def annotate(path: Path, notes: Mapping[str, str]) -> None:
    """Add entries to the metadata of an ONNX file. The file of its weights is not touched."""
    model = ir.load(path)
    model.metadata_props.update(notes)
    ir.save(model, path)


def published(*folders: Path) -> list[Published]:
    """List the precisions of published folders, in the order of `PRECISIONS`. One that lacks a part is left out.

    Where several folders have a file of the same precision, the file of the last such folder is listed.
    """
    found = []
    for name, precision in PRECISIONS.items():
        for layout in LAYOUTS:
            paths = [
                [path for folder in folders if (path := folder / ONNX_FOLDER / precision.named(part)).is_file()]
                for part in layout
            ]
            if all(paths):
                own, *parts = (Published.read(name, of_part[-1]) for of_part in paths)
                found.append(replace(own, parts=tuple(parts)))
    return found
