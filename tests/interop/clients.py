"""The questions that the tests ask other clients, and a plain onnxruntime loop in Python that answers the same ones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime


END = 7  # the end-of-turn token
NEW = 64

# Tolerances for the logits of the trained checkpoint, whose standard deviation is 4. Correct clients differ so much:
FLOAT32 = 1e-3  # the order of sums differs
FLOAT16 = 0.1  # a logit of 20 is rounded to 1/64, and so are the sums before it
INT8 = 0.6  # MatMulNBits with accuracy_level 4 rounds activations, and each processor's kernels round differently


def chat(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    turns = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return [{"role": "system", "content": system}, *turns] if system else turns


# One answer ends soon, one copies from a distant place in the prompt, one does not end for long. All lengths differ.
PROMPTS = [
    chat("What is 3 plus 4?"),
    chat("Ben put the silver key next to the well. Where is the silver key?"),
    "<|startoftext|>Once upon a time",
    chat("What is 3 plus 4?", "3 plus 4 is 7.", "Tell me a story.", system="Be kind."),
]
# The user's messages of one chat.
MESSAGES = [
    "What is 3 plus 4?",
    "Ben put the silver key next to the well. Where is the silver key?",
    "Tell me a story.",
]


def case(action: str, **arguments) -> dict:
    return {"action": action, **arguments}


def up_to_end(tokens: list[int]) -> list[int]:
    return tokens[: tokens.index(END) + 1] if END in tokens else tokens


@dataclass(frozen=True)
class Precision:
    """A precision, under its name in Transformers.js.

    Attributes:
        suffix: the suffix of the file's name.
        export: options of `main_export`.
        exact: the tolerance for the logits of two clients that do not round activations.
        rounded: the tolerance for the logits of two clients that round activations.
    """

    suffix: str
    export: dict[str, object]
    exact: float
    rounded: float

    @property
    def file(self) -> str:
        return f"onnx/model{self.suffix}.onnx"


PRECISIONS = {
    "fp32": Precision("", {}, FLOAT32, FLOAT32),
    "q8": Precision("_quantized", {"_variant": "q8"}, FLOAT32, INT8),
    "q4": Precision("_q4", {"_variant": "q4"}, FLOAT32, INT8),
    "fp16": Precision("_fp16", {"dtype": "fp16"}, FLOAT16, FLOAT16),
    "q4f16": Precision("_q4f16", {"dtype": "fp16", "_variant": "q4"}, FLOAT16, FLOAT16),
}


class PlainModel:
    """A graph that runs as in the model cards: caches start empty, and outputs are fed back to inputs in order.

    It takes one row without padding.

    Args:
        path: the ONNX file.
        exact: compute without rounding activations to 8 bits, as WebAssembly does.
    """

    def __init__(self, path: Path, exact: bool = False) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        graph = onnx.load(path)
        for node in graph.graph.node:
            for attribute in node.attribute:
                if attribute.name == "accuracy_level" and exact:
                    attribute.i = 0
        content = graph.SerializeToString()
        self.session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        self.caches = [value for value in self.session.get_inputs() if value.name.startswith("past")]

    def logits(self, ids: list[int]) -> np.ndarray:
        """Return the logits of every token, float32 (sequence_length, vocab_size), from one call."""
        return self._run(ids, len(ids), self._empty())[0]

    def assert_greedy(self, ids: list[int], tokens: list[int], tolerance: float) -> None:
        """Assert that each token is the most likely one after `ids` and the tokens before it, within `tolerance`."""
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
