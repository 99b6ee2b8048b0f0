"""How far each system's own quantiser takes a trained checkpoint from its float weights.

Speed is read beside it: a system may be fast because it computes something else. The measure is the KL divergence from
transformers in fp32, in nats a token, on the held-out text of the demo checkpoint.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.bench import ROOT, Bench, say


CHECKPOINT = ROOT / "demo" / "checkpoint"
TEXT = ROOT / "demo" / "heldout.txt"
GOLD = "transformers-fp32"


def divergences(bench: Bench, names: Sequence[str], chunks: int, length: int) -> dict[str, float]:
    """The mean KL divergence of each system; one that fails is told of and left out.

    Args:
        bench: of `CHECKPOINT`.
        chunks: how many chunks of the text to read, of `length` tokens each.
    """
    ids = read_chunks(chunks, length)
    with tempfile.TemporaryDirectory() as folder:

        def logits(name: str) -> np.ndarray:
            bench.prepare(name)
            path = Path(folder, f"{name}.npy")
            bench.job(name, "logits", chunks=ids, out=str(path))
            return _log_softmax(np.load(path).astype(np.float64))

        gold = logits(GOLD)
        found = {}
        for name in names:
            with bench.tolerant(name):
                own = logits(name)
                found[name] = float((np.exp(gold) * (gold - own)).sum(-1).mean())
                say(f"quality: {name}: KL divergence {found[name]:.5f}")
        return found


def read_chunks(count: int, length: int) -> list[list[int]]:
    """Return the ids of the first chunks of the held-out text, of so many tokens each."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    ids = tokenizer(TEXT.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False).input_ids
    return [ids[start : start + length] for start in range(0, count * length, length)]


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
