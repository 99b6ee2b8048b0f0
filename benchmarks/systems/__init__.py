"""The systems that are compared: for each, how its files are made and how it runs.

A system is imported only when it is used. So the memory of a worker counts only the system that it measures.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from benchmarks.systems.base import System


@dataclass(frozen=True)
class Entry:
    """One row of the table.

    Attributes:
        title: the system's name in the table.
        precision: the description of its weights in the table.
        bits: 32, 8 or 4. The system is compared with ours of the same width.
        files: the name of the folder of its files, which several entries may share. None is the checkpoint itself.
        module: a module of this package, with a class `System` and a function `prepare(checkpoint, folder, **options)`.
        options: the options of `System` and of `prepare`.
        package: the distribution that must be installed.
        imports: the modules that it imports. They are imported first, so that the time and memory of the libraries can
            be told from those of the model.
    """

    title: str
    precision: str
    bits: int
    files: str | None
    module: str
    package: str
    imports: tuple[str, ...]
    options: tuple[tuple[str, str], ...] = ()

    def prepare(self, checkpoint: Path, folder: Path) -> None:
        """Make the system's files from a checkpoint."""
        importlib.import_module(f"benchmarks.systems.{self.module}").prepare(checkpoint, folder, **dict(self.options))

    def load(self, folder: Path, threads: int, length: int) -> System:
        """Load it with room for `length` tokens."""
        return importlib.import_module(f"benchmarks.systems.{self.module}").System(
            folder, threads, length, **dict(self.options)
        )


def _each(
    title: str, files: str, module: str, package: str, imports: tuple[str, ...], option: str, rows: tuple
) -> dict:
    """Make entries that differ in one option, named `{files}-{option}`. A row is (option, precision, bits)."""
    return {
        f"{files}-{value.lower()}": Entry(
            title, precision, bits, f"{files}-{value.lower()}", module, package, imports, ((option, value),)
        )
        for value, precision, bits in rows
    }


VARIANTS = (
    ("fp32", "fp32", 32), ("q8", "q8", 8), ("q4", "q4", 4), ("q4s", "q4s", 4), ("q4-kv8", "q4, cache of 8 bits", 4),
)  # fmt: skip
OPTIMUM = ("optimum_lfm2", "optimum.onnxruntime")
TORCH = ("torch", "transformers.models.lfm2.modeling_lfm2", "transformers.generation")

_ours = _each("optimum-lfm2, generate()", "ours", "ours", "onnxruntime", OPTIMUM, "variant", VARIANTS)
_loops = _each("optimum-lfm2, bare session loop", "loop", "loop", "onnxruntime", ("onnxruntime",), "variant", VARIANTS)

SYSTEMS: dict[str, Entry] = {
    **_ours,
    # The same files.
    **{name: replace(entry, files=entry.files.replace("loop", "ours")) for name, entry in _loops.items()},
    "transformers-fp32": Entry("transformers", "fp32, sdpa", 32, None, "torch_", "transformers", TORCH),
    **_each(
        "onnxruntime-genai", "genai", "genai", "onnxruntime-genai", ("onnxruntime_genai",), "precision",
        (("fp32", "fp32, prune_lm_head", 32), ("int4", "int4, prune_lm_head", 4)),
    ),
    **_each(
        "llama.cpp", "llama", "llama", "llama-cpp-python", ("llama_cpp",), "kind",
        (("F32", "F32", 32), ("Q8_0", "Q8_0", 8), ("Q4_0", "Q4_0", 4)),
    ),
    **_each(
        "openvino-genai", "openvino", "openvino", "openvino-genai", ("openvino_genai",), "weights",
        (("fp32", "fp32, SDPA", 32), ("int8", "int8, SDPA", 8), ("int4", "int4, SDPA", 4)),
    ),
}  # fmt: skip
