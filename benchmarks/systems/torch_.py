"""transformers alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.systems import base


class System(base.System):
    def __init__(self, folder: Path, threads: int, length: int, dtype: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        self.model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), attn_implementation="sdpa"
        ).eval()

    def run(self, ids: list[int], new: int) -> base.Timing:
        return base.run_generate(self.model, ids, new)

    def logits(self, ids: list[int]) -> np.ndarray:
        return base.forward_logits(self.model, ids)
