"""openvino-genai, with the model that optimum-intel converts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

from benchmarks.systems import base


def prepare(checkpoint: Path, folder: Path, weights: str) -> None:
    """Convert the model with optimum-intel."""
    command = [str(Path(sys.executable).parent / "optimum-cli"), "export", "openvino", "--model", str(checkpoint)]
    command += ["--task", "text-generation-with-past", "--weight-format", weights, str(folder)]
    subprocess.run(command, check=True, cwd=folder)


class System(base.System):
    def __init__(self, folder: Path, threads: int, length: int, weights: str) -> None:
        import openvino
        import openvino_genai

        self.folder, self.openvino = folder, openvino
        self.api = openvino_genai
        # The default backend, paged attention, gives wrong tokens for LFM2 (openvino-genai 2026.4). By default it would
        # compute in bfloat16 with float weights.
        precision = {"INFERENCE_PRECISION_HINT": "f32"} if weights == "fp32" else {}
        self.pipe = openvino_genai.LLMPipeline(
            str(folder), "CPU", ATTENTION_BACKEND="SDPA", INFERENCE_NUM_THREADS=threads, **precision
        )

    def run(self, ids: list[int], new: int) -> base.Timing:
        config = self.api.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = new + 1, True, False
        config.apply_chat_template = False
        timing, running = base.Timing(), self.api.StreamingStatus.RUNNING

        class Stamps(self.api.StreamerBase):
            def write(self, token):
                for one in token if isinstance(token, list) else [token]:
                    timing.add(int(one))
                return running

            def end(self) -> None:
                pass

        self.pipe.generate(self.openvino.Tensor(np.array([ids], np.int64)), config, Stamps())
        return timing

    def logits(self, ids: list[int]) -> np.ndarray:
        # The pipeline gives tokens alone: so its model is run without it.
        model = self.openvino.Core().compile_model(self.folder / "openvino_model.xml", "CPU")
        values = {
            "input_ids": np.array([ids], np.int64),
            "attention_mask": np.ones((1, len(ids)), np.int64),
            "position_ids": np.arange(len(ids), dtype=np.int64)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        names = [name for value in model.inputs for name in value.names]
        result = model.create_infer_request().infer({name: values[name] for name in names})
        return np.array(result["logits"][0])
