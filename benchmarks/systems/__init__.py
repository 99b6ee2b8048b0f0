"""The systems that are compared: for each, how its files are made and how it runs.

Nothing here imports a system before it is used: a worker loads the one that it measures, and its memory counts that alone.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from benchmarks.systems.base import System


@dataclass(frozen=True)
class Entry:
    """One row of the table.

    Attributes:
        title: what the table calls it.
        precision: what the table says of its weights.
        bits: 32, 8 or 4: which of ours it is compared with.
        files: name of the folder of its files, which several entries may share; None: the checkpoint itself.
        module: in this package, with a class `System` and a function `prepare(checkpoint, folder, **options)`.
        options: of both.
        package: the distribution that must be installed.
    """

    title: str
    precision: str
    bits: int
    files: str | None
    module: str
    package: str
    options: tuple[tuple[str, str], ...] = ()

    def prepare(self, checkpoint: Path, folder: Path) -> None:
        importlib.import_module(f"benchmarks.systems.{self.module}").prepare(checkpoint, folder, **dict(self.options))

    def load(self, folder: Path, threads: int, length: int) -> System:
        """Load it with room for `length` tokens."""
        return importlib.import_module(f"benchmarks.systems.{self.module}").System(
            folder, threads, length, **dict(self.options)
        )


def _ours() -> dict[str, Entry]:
    entries = {}
    for variant, bits in (("fp32", 32), ("q8", 8), ("q4", 4)):
        options = (("variant", variant),)
        entries[f"ours-{variant}"] = Entry(
            "optimum-lfm2, generate()", variant, bits, f"ours-{variant}", "ours", "onnxruntime", options
        )
        entries[f"loop-{variant}"] = Entry(
            "optimum-lfm2, bare session loop", variant, bits, f"ours-{variant}", "loop", "onnxruntime", options
        )
    return entries


SYSTEMS: dict[str, Entry] = {
    **_ours(),
    "transformers-fp32": Entry("transformers", "fp32, sdpa", 32, None, "torch_", "transformers"),
    "genai-fp32": Entry(
        "onnxruntime-genai", "fp32, prune_lm_head", 32, "genai-fp32", "genai", "onnxruntime-genai", (("precision", "fp32"),)
    ),
    "genai-int4": Entry(
        "onnxruntime-genai", "int4, prune_lm_head", 4, "genai-int4", "genai", "onnxruntime-genai", (("precision", "int4"),)
    ),
    "llama-f32": Entry("llama.cpp", "F32", 32, "llama-f32", "llama", "llama-cpp-python", (("kind", "F32"),)),
    "llama-q8_0": Entry("llama.cpp", "Q8_0", 8, "llama-q8_0", "llama", "llama-cpp-python", (("kind", "Q8_0"),)),
    "llama-q4_0": Entry("llama.cpp", "Q4_0", 4, "llama-q4_0", "llama", "llama-cpp-python", (("kind", "Q4_0"),)),
    "openvino-f32": Entry("openvino-genai", "fp32, SDPA", 32, "openvino-fp32", "openvino", "openvino-genai", (("weights", "fp32"),)),
    "openvino-int8": Entry("openvino-genai", "int8, SDPA", 8, "openvino-int8", "openvino", "openvino-genai", (("weights", "int8"),)),
    "openvino-int4": Entry("openvino-genai", "int4, SDPA", 4, "openvino-int4", "openvino", "openvino-genai", (("weights", "int4"),)),
}
