"""The systems that are compared: for each, how its files are made and how it runs.

Nothing here imports a system before it is used: a worker loads the one that it measures, and its memory
counts that alone.
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
        title: what the table calls it.
        precision: what the table says of its weights.
        bits: 32, 8 or 4: which of ours it is compared with.
        head: bits of the head's weights.
        files: name of the folder of its files, or None: the checkpoint itself.
        module: in this package, with a class `System`, and a function `prepare(checkpoint, folder, **options)` if it
            has files of its own.
        options: of both.
        package: the distribution that must be installed.
        imports: the modules that it loads, so that their time and memory can be told from the model's.
        of: the system whose files it runs, where they are not its own.
    """

    title: str
    precision: str
    bits: int
    head: int
    files: str | None
    module: str
    package: str
    imports: tuple[str, ...]
    options: tuple[tuple[str, str], ...] = ()
    of: str | None = None

    def prepare(self, checkpoint: Path, folder: Path) -> None:
        importlib.import_module(f"benchmarks.systems.{self.module}").prepare(checkpoint, folder, **dict(self.options))

    def load(self, folder: Path, threads: int, length: int) -> System:
        """Load it with room for `length` tokens."""
        return importlib.import_module(f"benchmarks.systems.{self.module}").System(
            folder, threads, length, **dict(self.options)
        )


def _each(
    title: str, files: str, module: str, package: str, imports: tuple[str, ...], option: str, rows: tuple
) -> dict:
    """Entries that differ in one option, by `{files}-{option}`.

    A row is the option, the precision in words, the bits of the weights and those of the head.
    """
    return {
        f"{files}-{value.lower()}": Entry(
            title, precision, bits, head, f"{files}-{value.lower()}", module, package, imports, ((option, value),)
        )
        for value, precision, bits, head in rows
    }


VARIANTS = (
    ("fp32", "fp32", 32, 32), ("q8", "q8", 8, 8), ("q4", "q4, blocks of 128", 4, 8),
    ("q4-b32", "q4, blocks of 32", 4, 8), ("q4s", "q4s, blocks of 128", 4, 4),
    ("q4-kv8", "q4, KV cache in 8 bits", 4, 8), ("q4-columns", "q4, the columns of its states given", 4, 8),
)  # fmt: skip
OPTIMUM = ("optimum_lfm2", "optimum.onnxruntime")
GENAI = ("onnxruntime_genai",)
TORCH = ("torch", "transformers.models.lfm2.modeling_lfm2", "transformers.generation")


def _transformers(precision: str, bits: int, head: int, dtype: str) -> Entry:
    return Entry("transformers", precision, bits, head, None, "torch_", "transformers", TORCH, (("dtype", dtype),))


_ours = _each("optimum-lfm2, generate()", "ours", "ours", "onnxruntime", OPTIMUM, "variant", VARIANTS)


def _elsewhere(
    title: str, prefix: str, module: str, package: str, imports: tuple[str, ...], option: str, without: tuple = ()
) -> dict[str, Entry]:
    """Entries for our files in another program. Its module takes the variant as `option`."""
    changes = {"title": title, "module": module, "package": package, "imports": imports}
    return {
        name.replace("ours", prefix): replace(entry, of=name, options=((option, variant),), **changes)
        for (variant, *_), (name, entry) in zip(VARIANTS, _ours.items(), strict=True)
        if variant not in without
    }


SYSTEMS: dict[str, Entry] = {
    **_ours,
    **_elsewhere("optimum-lfm2, bare session loop", "loop", "loop", "onnxruntime", ("onnxruntime",), "variant"),
    **_elsewhere(
        "optimum-lfm2, in onnxruntime-genai", "ours-genai", "genai", "onnxruntime-genai", GENAI, "precision",
        without=("q4-kv8", "q4-columns"),  # genai_config.json names neither a KV cache in 8 bits nor columns
    ),
    "transformers-fp32": _transformers("fp32, sdpa", 32, 32, "float32"),
    # The smallest that it has without another library, so what our q4 replaces.
    "transformers-bf16": _transformers("bf16, sdpa", 4, 16, "bfloat16"),
    **_each(
        "onnxruntime-genai", "genai", "genai", "onnxruntime-genai", GENAI, "precision",
        (
            ("fp32", "fp32", 32, 32), ("int4", "int4, blocks of 32 (its default)", 4, 4),
            ("int4-128", "int4, blocks of 128", 4, 4),
        ),
    ),
    **_each(
        "llama.cpp", "llama", "llama", "xllamacpp", ("xllamacpp",), "kind",
        (("F32", "F32", 32, 32), ("Q8_0", "Q8_0", 8, 8), ("Q4_0", "Q4_0, blocks of 32", 4, 6)),
    ),
    **_each(
        "openvino-genai", "openvino", "openvino", "openvino-genai", ("openvino_genai",), "weights",
        (("fp32", "fp32", 32, 32), ("int8", "int8", 8, 8), ("int4", "int4, groups of 128", 4, 8)),
    ),
}  # fmt: skip
