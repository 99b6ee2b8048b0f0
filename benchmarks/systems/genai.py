"""onnxruntime-genai, with the graph that its own builder makes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from benchmarks.systems import base


def prepare(checkpoint: Path, folder: Path, precision: str) -> None:
    """Build the graph.

    Args:
        precision: fp32 or int4; int4-128 for blocks of 128, where the builder's default is 32.
    """
    precision, _, block_size = precision.partition("-")
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(checkpoint), "-o", str(folder)]
    command += ["-p", precision, "-e", "cpu", "-c", str(folder / "cache")]
    options = ["prune_lm_head=true", "hf_token=false", *([f"block_size={block_size}"] if block_size else [])]
    subprocess.run([*command, "--extra_options", *options], check=True)


class System(base.System):
    def __init__(self, folder: Path, threads: int, length: int, precision: str) -> None:
        import onnxruntime_genai as og

        self.og, self.length = og, length
        config = og.Config(str(folder))
        # By default it takes one thread here.
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

    def logits(self, ids: list[int]) -> np.ndarray:
        # Token by token: the graph gives the logits of the last one alone.
        parameters = self.og.GeneratorParams(self.model)
        parameters.set_search_options(max_length=self.length, do_sample=False)
        generator = self.og.Generator(self.model, parameters)
        rows = []
        for token in ids:
            generator.append_tokens([token])
            rows.append(np.array(generator.get_logits()).reshape(-1))
        return np.stack(rows)
