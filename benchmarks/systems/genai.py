"""onnxruntime-genai, with the graph that its own builder makes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.systems import base


def prepare(checkpoint: Path, folder: Path, precision: str) -> None:
    """Build the model with onnxruntime-genai's builder."""
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(checkpoint), "-o", str(folder)]
    command += ["-p", precision, "-e", "cpu", "-c", str(folder / "cache")]
    subprocess.run([*command, "--extra_options", "prune_lm_head=true", "hf_token=false"], check=True)


class System(base.System):
    def __init__(self, folder: Path, threads: int, length: int, precision: str) -> None:
        import onnxruntime_genai as og

        self.og, self.length = og, length
        config = og.Config(str(folder))
        # onnxruntime-genai takes one thread unless its config says otherwise.
        config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
        self.model = og.Model(config)

    def start(self, ids: list[int]) -> int:
        parameters = self.og.GeneratorParams(self.model)
        parameters.set_search_options(max_length=self.length, min_length=self.length, do_sample=False)
        self.generator = self.og.Generator(self.model, parameters)
        self.generator.append_tokens(ids)
        return self.step(0)

    def step(self, token: int) -> int:
        self.generator.generate_next_token()
        return int(self.generator.get_next_tokens()[0])
