"""llama.cpp by the package xllamacpp: its server in this process, on a GGUF file written from the checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gguf_files import MIXES, ggml_quantiser, token_of, write_gguf
from benchmarks.systems import base


ALL = 1 << 24  # more than any vocabulary has


def prepare(checkpoint: Path, folder: Path, kind: str) -> None:
    options = {} if kind == "F32" else {"kind": MIXES[kind], "quantise": ggml_quantiser()}
    write_gguf(checkpoint, _file(folder, kind), **options)


def _file(folder: Path, kind: str) -> Path:
    return folder / f"model.{kind}.gguf"


class LlamaCpp(base.System):
    """llama.cpp on a file whose words stand for their ids, for one text at a time.

    Args:
        path: the file.
        threads: of prompts and of tokens.
        length: of the longest text.
    """

    def __init__(self, path: Path, threads: int, length: int) -> None:
        import xllamacpp

        settings = xllamacpp.CommonParams()
        settings.model.path = str(path)
        settings.n_ctx, settings.n_parallel, settings.warmup, settings.verbosity = length, 1, False, -1
        settings.cache_ram_mib = settings.n_ctx_checkpoints = 0  # of texts to go back to, which nobody does here
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
        self.server = xllamacpp.Server(settings)

    def run(self, ids: list[int], new: int) -> base.Timing:
        timing = base.Timing()
        last: dict[str, Any] = {}

        def take(part: dict[str, Any]) -> None:
            last.update(part)
            if text := part["choices"][0]["text"] if "choices" in part else "":
                timing.add(token_of(text))

        self._ask(ids, new + 1, take, cache_prompt=False, ignore_eos=True, stream=True)
        if len(timing.tokens) != new + 1:
            raise RuntimeError(f"llama.cpp wrote {len(timing.tokens)} of {new + 1} tokens: {str(last)[:200]}")
        return timing

    def logits(self, ids: list[int]) -> np.ndarray:
        """Log-probabilities, of which a softmax makes the same as of logits."""
        # Each prompt begins with the one before it, of which llama.cpp keeps the cache.
        return np.concatenate([self.distributions(ids[: i + 1], 1, cache_prompt=i > 0)[1] for i in range(len(ids))])

    def distributions(self, ids: list[int], new: int, cache_prompt: bool = False) -> tuple[list[int], np.ndarray]:
        """Continue a prompt greedily.

        Args:
            ids: the prompt.
            new: how many tokens to write.
            cache_prompt: whether the prompt may go on from what was read before.

        Returns:
            The tokens, and the log-probabilities that each of them was taken from, float64 (new, vocabulary).

        Raises:
            RuntimeError: llama.cpp does not give the whole distribution of each token.
        """
        answer = self._ask(ids, new, cache_prompt=cache_prompt, n_probs=ALL)
        if "choices" not in answer:
            raise RuntimeError(f"llama.cpp does not answer: {str(answer)[:200]}")
        steps = answer["choices"][0]["logprobs"]["content"]
        found = np.full((len(steps), len(steps[0]["top_logprobs"])), -np.inf)
        for row, step in zip(found, steps, strict=True):
            row[[entry["id"] for entry in step["top_logprobs"]]] = [entry["logprob"] for entry in step["top_logprobs"]]
        # They are rounded, and sum to 1 but for some millionths, which is as much as is compared.
        if len(steps) != new or np.abs(np.exp(found).sum(-1) - 1).max() > 1e-3:
            raise RuntimeError(f"llama.cpp gave {len(steps)} of {new} distributions, or not all of each")
        return [step["id"] for step in steps], found

    def _ask(self, ids: list[int], new: int, *callback: Any, **options: Any) -> Any:
        return self.server.handle_completions({"prompt": ids, "n_predict": new, "temperature": 0, **options}, *callback)


class System(LlamaCpp):
    def __init__(self, folder: Path, threads: int, length: int, kind: str) -> None:
        super().__init__(_file(folder, kind), threads, length)
