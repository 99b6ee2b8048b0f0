"""How far an export is from its checkpoint: perplexity, KL divergence and top-1 agreement on chunks of text.

Both models read the same chunks; the second half of each is scored, where the model has seen enough to predict.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoTokenizer

from optimum_lfm2.errors import Lfm2Error, first_line
from optimum_lfm2.quality.scoring import Model, load


TOKENS_AT_ONCE = 64  # in double precision: bounds the memory of the comparison


@dataclass(frozen=True)
class Quality:
    """What `evaluate` measures; divergences are in nats, from the reference.

    Attributes:
        perplexity, reference_perplexity: of the text under each model.
        kl_divergence: mean over the scored tokens.
        kl_divergence_error: its standard error, from the means of the chunks: tokens of one chunk are not independent.
        top1_agreement: share of the scored tokens for which both models find the same token most likely.
        chunks, tokens: how many of each were scored.
    """

    perplexity: float
    reference_perplexity: float
    kl_divergence: float
    kl_divergence_error: float
    top1_agreement: float
    chunks: int
    tokens: int

    def as_dict(self) -> dict[str, float | int]:
        return asdict(self)

    def table(self) -> str:
        rows = [
            ("", "reference", "this model"),
            ("perplexity", f"{self.reference_perplexity:.4f}", f"{self.perplexity:.4f}"),
            ("mean KL divergence", "", f"{self.kl_divergence:.6f} ± {self.kl_divergence_error:.6f}"),
            ("same top token", "", f"{self.top1_agreement:.2%}"),
            ("tokens scored", "", f"{self.tokens} in {self.chunks} chunks"),
        ]
        return "\n".join(f"{name:<20}{reference:>12}  {own:>22}".rstrip() for name, reference, own in rows)


def evaluate(
    model: str | Path, reference: str | Path, text: str | Path, chunks: int = 64, length: int = 512
) -> Quality:
    """Compare two models on a text file.

    Args:
        model, reference: an ONNX file, a folder with one, or a checkpoint that transformers loads.
        text: a file in UTF-8. Special tokens that it spells are read as such.
        chunks: how many to read at most. Less text, fewer chunks; two at least.
        length: tokens of a chunk.

    Raises:
        Lfm2Error: for a model or text that cannot be used.
    """
    model, reference = Path(model), Path(reference)
    pieces = read_chunks(text, find_tokenizer(reference, model), chunks, length)
    return measure(load(model), load(reference), pieces)


def measure(own: Model, gold: Model, pieces: Sequence[torch.Tensor]) -> Quality:
    """Compare two models on chunks, each int64 (1, length)."""
    progress = tqdm(pieces, desc="Comparing", unit="chunk", disable=None, leave=False)
    compared = zip(progress, own(pieces), gold(pieces), strict=True)
    return summarise(compare(logits, reference, ids[0]) for ids, logits, reference in compared)


@dataclass(frozen=True)
class Sums:
    """Of one chunk: sums over its scored tokens."""

    tokens: int
    loss: float
    reference_loss: float
    divergence: float
    agreements: int


def compare(logits: torch.Tensor, reference: torch.Tensor, ids: torch.Tensor) -> Sums:
    """Score a chunk: `logits` and `reference`, float (count, vocabulary), are those of its last `count` tokens."""
    if logits.shape != reference.shape:
        raise Lfm2Error(
            f"The models differ in vocabulary, {logits.shape[1]} and {reference.shape[1]} tokens. "
            "Compare an export with its own checkpoint."
        )
    count = len(logits) - 1  # the last token's successor is not known
    targets = ids[len(ids) - count :]
    loss = reference_loss = divergence = 0.0
    agreements = 0
    for part in torch.arange(count).split(TOKENS_AT_ONCE):
        own, gold = (x[part].double().log_softmax(-1) for x in (logits, reference))
        loss -= float(own.gather(1, targets[part, None]).sum())
        reference_loss -= float(gold.gather(1, targets[part, None]).sum())
        divergence += float((gold.exp() * (gold - own)).sum())
        agreements += int((own.argmax(-1) == gold.argmax(-1)).sum())
    if not math.isfinite(loss + reference_loss + divergence):
        raise Lfm2Error("The logits are not finite numbers. A file in half precision may have overflowed: export fp32.")
    return Sums(count, loss, reference_loss, divergence, agreements)


def summarise(parts: Iterable[Sums]) -> Quality:
    """Means over all chunks, each of the same size."""
    chunks = list(parts)
    tokens = sum(chunk.tokens for chunk in chunks)
    divergences = np.array([chunk.divergence / chunk.tokens for chunk in chunks])
    return Quality(
        perplexity=_exp(sum(chunk.loss for chunk in chunks) / tokens),
        reference_perplexity=_exp(sum(chunk.reference_loss for chunk in chunks) / tokens),
        kl_divergence=float(divergences.mean()),
        kl_divergence_error=float(divergences.std(ddof=1) / len(chunks) ** 0.5),
        top1_agreement=sum(chunk.agreements for chunk in chunks) / tokens,
        chunks=len(chunks),
        tokens=tokens,
    )


def _exp(x: float) -> float:
    """Infinite where `math.exp` fails: a broken file may lose any number of nats a token."""
    return float(torch.tensor(x, dtype=torch.float64).exp())


def find_tokenizer(*folders: Path) -> Any:
    """The first tokenizer that lies with a model. Raises `Lfm2Error` where there is none."""
    for path in map(Path.absolute, folders):
        candidates = (path, path.parent) if path.is_dir() else (path.parent, path.parent.parent)
        for folder in candidates:
            if (folder / "tokenizer_config.json").is_file():
                try:
                    return AutoTokenizer.from_pretrained(folder)
                except (OSError, ValueError) as error:
                    raise Lfm2Error(f"The tokenizer in {folder} cannot be loaded ({first_line(error)}).") from None
    raise Lfm2Error(f"No tokenizer lies beside {' or '.join(map(str, folders))}. Copy the checkpoint's there.")


def read_chunks(text: str | Path, tokenizer: Any, chunks: int, length: int) -> list[torch.Tensor]:
    """Ids (1, length), one after the other in the text, each headed by the tokenizer's first token if it has one.

    Raises:
        Lfm2Error: for fewer than two chunks of two tokens, in what is asked for or in the text.
    """
    if chunks < 2 or length < 2:
        raise Lfm2Error(f"{chunks} chunks of {length} tokens cannot be compared: two of each are the least.")
    try:
        written = Path(text).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Lfm2Error(f"{text} cannot be read as a text ({error}).") from None
    first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids = torch.tensor(tokenizer(written, add_special_tokens=False, verbose=False).input_ids, dtype=torch.int64)
    step = length - len(first)
    pieces = [torch.cat([torch.tensor(first, dtype=torch.int64), piece])[None] for piece in ids.split(step)[:chunks]]
    if pieces and pieces[-1].shape[1] < length:
        pieces.pop()
    if len(pieces) < 2:
        raise Lfm2Error(
            f"{text} has {len(ids)} tokens, and two chunks of {length} are the least. Give more text or shorter chunks."
        )
    return pieces
