"""What a client's tokens are held against: the same file in onnxruntime for Python, in a loop that knows nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime


END = 7  # the end of a turn


@dataclass(frozen=True)
class Precision:
    """A precision by Transformers.js's name for it.

    Attributes:
        suffix: of the file's name.
        export: options of `main_export`.
        tolerance: how far two right clients' logits may lie apart. fp16 rounds logits of 20 to 1/64, sums of such a
            little more; MatMulNBits with accuracy_level 4 rounds activations to 8 bits, which moves this model's logits
            by 0.4 from exact ones, and the kernels of other processors round otherwise.
    """

    suffix: str
    export: dict[str, object]
    tolerance: float


PRECISIONS = {
    "fp32": Precision("", {}, 1e-3),
    "q8": Precision("_quantized", {"variant": "q8"}, 0.5),
    "q4": Precision("_q4", {"variant": "q4"}, 0.5),
    "fp16": Precision("_fp16", {"dtype": "fp16"}, 0.1),
    "q4f16": Precision("_q4f16", {"dtype": "fp16", "variant": "q4"}, 0.1),
}


class PlainModel:
    """A graph run as the model cards show it: empty caches, then outputs zipped to inputs. Rows without padding."""

    def __init__(self, path: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.caches = [value for value in self.session.get_inputs() if value.name.startswith("past")]

    def logits(self, ids: list[int]) -> np.ndarray:
        """Of every token, float32 (sequence_length, vocab_size), in one call."""
        return self._run(ids, len(ids), self._empty())[0]

    def greedy(self, ids: list[int], count: int, end: int | None = END) -> list[int]:
        """The next `count` tokens, or those up to `end`."""
        caches, new, total, tokens = self._empty(), ids, 0, []
        while len(tokens) < count and (not tokens or tokens[-1] != end):
            total += len(new)
            logits, caches = self._run(new, total, caches)
            new = [int(logits[-1].argmax())]
            tokens += new
        return tokens

    def assert_greedy(self, ids: list[int], tokens: list[int], tolerance: float) -> None:
        """Each of `tokens` must be what this file likes best after `ids` and the tokens before, or as good as that."""
        logits = self.logits(ids + tokens[:-1])[len(ids) - 1 :]
        regret = logits.max(-1) - logits[np.arange(len(tokens)), tokens]
        assert regret.max() <= tolerance, f"token {regret.argmax()} of {tokens}: worse than the best by {regret.max()}"

    def _empty(self) -> list[np.ndarray]:
        dims = [[{"batch_size": 1}.get(d, 0) if isinstance(d, str) else d for d in c.shape] for c in self.caches]
        dtypes = [np.float16 if "float16" in c.type else np.float32 for c in self.caches]
        return [np.zeros(shape, dtype) for shape, dtype in zip(dims, dtypes, strict=True)]

    def _run(self, ids: list[int], total: int, caches: list[np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
        feeds = {"input_ids": np.array([ids], np.int64), "attention_mask": np.ones((1, total), np.int64)}
        feeds |= {value.name: cache for value, cache in zip(self.caches, caches, strict=True)}
        if any(value.name == "num_logits_to_keep" for value in self.session.get_inputs()):
            feeds["num_logits_to_keep"] = np.array(0, np.int64)
        logits, *caches = self.session.run(None, feeds)
        return logits[0].astype(np.float32), caches
