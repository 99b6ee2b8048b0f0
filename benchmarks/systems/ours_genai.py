"""Our folder in onnxruntime-genai, as it is."""

from __future__ import annotations

from pathlib import Path

from benchmarks.systems import genai


class System(genai.System):
    def __init__(self, folder: Path, threads: int, length: int, variant: str) -> None:
        super().__init__(folder, threads, length, precision=variant)
