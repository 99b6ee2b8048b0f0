"""Compare an export with its checkpoint on a text: perplexity, KL divergence and top-1 agreement.

Both models read the same chunks of the text. Only the second half of each chunk is scored, since the first half gives
the model the context from which it predicts.
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
from optimum_lfm2.loading.gguf import is_gguf, standing_in
from optimum_lfm2.quality.scoring import Model, check_exists, load
from optimum_lfm2.quality.similarity import Similarity, compare_encoders, encodes, load_encoder
from optimum_lfm2.quality.words import legend, loss_in_words


# The KL divergence in nats below which a loss is none that shows, next to none, slight, noticeable.
KL_BOUNDS = (1e-5, 1e-3, 1e-2, 1e-1)
TOKENS_AT_ONCE = 64  # tokens compared at a time in double precision; bounds the memory of the comparison


@dataclass(frozen=True)
class Quality:
    """The figures that `evaluate` measures.

    Attributes:
        perplexity, reference_perplexity: the perplexity of the text under the model and under the reference.
        kl_divergence: the KL divergence from the reference in nats, as a mean over the scored tokens.
        kl_divergence_error: its standard error. It is computed over the means of the chunks, since the tokens of one
            chunk are not independent.
        top1_agreement: the share of the scored tokens for which both models find the same token most likely.
        chunks, tokens: how many chunks and tokens were scored.
    """

    perplexity: float
    reference_perplexity: float
    kl_divergence: float
    kl_divergence_error: float
    top1_agreement: float
    chunks: int
    tokens: int

    def as_dict(self) -> dict[str, float | int]:
        """Return the figures by name, ready for JSON."""
        return asdict(self)

    @property
    def loss(self) -> str:
        """The loss of quality in words."""
        return loss_in_words(self.kl_divergence, KL_BOUNDS)

    def summary(self) -> str:
        """Return the main figures in one line."""
        return f"{self.loss} (KL divergence {self.kl_divergence:.2g}, perplexity {self.perplexity:.4g})"

    def cells(self) -> dict[str, str]:
        """Return what a model card says of a file, by the heading of the column."""
        return {
            "loss": self.loss,
            "perplexity": f"{self.perplexity:.4f}",
            "KL divergence": f"{self.kl_divergence:.6f} ± {self.kl_divergence_error:.6f}",
            "same top token": f"{self.top1_agreement:.2%}",
        }

    def measured(self, text: str) -> str:
        """Return how a model card says that the figures were measured on a text of this name."""
        return (
            "Perplexity, mean KL divergence and agreement are from `optimum-cli lfm2 evaluate`, which compares with "
            f"the checkpoint in fp32, on {self.tokens} tokens of `{text}`, where the checkpoint has a perplexity of "
            f"{self.reference_perplexity:.4f}. {legend(KL_BOUNDS, 'KL divergence')}"
        )

    def table(self) -> str:
        """Return the figures as lines of text for a terminal."""
        rows = [
            ("", "reference", "this model"),
            ("perplexity", f"{self.reference_perplexity:.4f}", f"{self.perplexity:.4f}"),
            ("mean KL divergence", "", f"{self.kl_divergence:.6f} ± {self.kl_divergence_error:.6f}"),
            ("same top token", "", f"{self.top1_agreement:.2%}"),
            ("loss", "", self.loss),
            ("tokens scored", "", f"{self.tokens} in {self.chunks} chunks"),
        ]
        return "\n".join(f"{name:<20}{reference:>12}  {own:>22}".rstrip() for name, reference, own in rows)


def evaluate(
    model: str | Path, reference: str | Path, text: str | Path, chunks: int = 64, length: int = 512
) -> Quality | Similarity:
    """Compare two models on a text file: decoders by what they predict, encoders by their vectors.

    Args:
        model, reference: an ONNX file, a folder with one ONNX file, or a checkpoint that transformers loads.
            `reference` may be a GGUF file too, whose dequantised weights are computed with.
        text: a text file in UTF-8. The name of a special token in it is read as that token.
        chunks: the largest number of chunks to read. A short text gives fewer; two are the least.
        length: the tokens of a chunk.

    Raises:
        Lfm2Error: a model or the text cannot be used.
    """
    model, reference = Path(model), Path(reference)
    for path in (model, reference):
        check_exists(path)
    if is_gguf(reference):
        with standing_in(reference) as folder:
            return evaluate(model, folder, text, chunks, length)
    pieces = read_chunks(text, find_tokenizer(reference, model), chunks, length)
    if encodes(reference) or encodes(model):
        return compare_encoders(load_encoder(model), load_encoder(reference), pieces)
    return measure(load(model), load(reference), pieces)


def measure(own: Model, gold: Model, pieces: Sequence[torch.Tensor]) -> Quality:
    """Compare the model `own` with the reference `gold` on chunks of ids, each int64 (1, length).

    Raises:
        Lfm2Error: the vocabularies differ, or logits are not finite.
    """
    progress = tqdm(pieces, desc="Comparing", unit="chunk", disable=None, leave=False)
    compared = zip(progress, own(pieces), gold(pieces), strict=True)
    return summarise(compare(logits, reference, ids[0]) for ids, logits, reference in compared)


@dataclass(frozen=True)
class Sums:
    """Sums over the scored tokens of one chunk.

    Attributes:
        tokens: how many tokens were scored.
        loss, reference_loss: the negative log-likelihood under the model and under the reference, in nats.
        divergence: the KL divergence from the reference, in nats.
        agreements: for how many tokens both models find the same token most likely.
    """

    tokens: int
    loss: float
    reference_loss: float
    divergence: float
    agreements: int


def compare(logits: torch.Tensor, reference: torch.Tensor, ids: torch.Tensor) -> Sums:
    """Score a chunk.

    Args:
        logits, reference: the logits of the chunk's last `count` tokens under each model, float (count, vocabulary).
        ids: the chunk, int64 (length).

    Raises:
        Lfm2Error: the vocabularies differ, or logits are not finite.
    """
    if logits.shape != reference.shape:
        raise Lfm2Error(
            f"The vocabularies of the two models differ: {logits.shape[1]} and {reference.shape[1]} tokens. "
            "Compare an export with its own checkpoint."
        )
    count = len(logits) - 1  # the text does not say which token follows the last one
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
        raise Lfm2Error("The logits are not finite numbers. A float16 model may have overflowed: export it in fp32.")
    return Sums(count, loss, reference_loss, divergence, agreements)


def summarise(parts: Iterable[Sums]) -> Quality:
    """Turn the sums of all chunks into means. All chunks have the same number of tokens."""
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
    """Return e to the power of x, or infinity where `math.exp` would fail. A broken model can have any loss."""
    return float(torch.tensor(x, dtype=torch.float64).exp())


def find_tokenizer(*folders: Path) -> Any:
    """Load the first tokenizer that is found in or beside the given folders and files.

    Raises:
        Lfm2Error: there is no tokenizer, or it cannot be loaded.
    """
    for path in map(Path.absolute, folders):
        candidates = (path, path.parent) if path.is_dir() else (path.parent, path.parent.parent)
        for folder in candidates:
            if (folder / "tokenizer_config.json").is_file():
                try:
                    return AutoTokenizer.from_pretrained(folder)
                except Exception as error:  # `tokenizers` has no class of its own for its errors
                    raise Lfm2Error(
                        f"The tokenizer in {folder} cannot be loaded ({first_line(error)}). "
                        "Copy the checkpoint's tokenizer there."
                    ) from None
    raise Lfm2Error(
        f"There is no tokenizer in {' or '.join(map(str, folders))}. Copy the checkpoint's tokenizer there."
    )


def read_text(path: str | Path) -> str:
    """Read a text file in UTF-8. Raise `Lfm2Error` where it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Lfm2Error(f"{path} cannot be read ({error}). Give a text file in UTF-8.") from None


def read_chunks(text: str | Path, tokenizer: Any, chunks: int, length: int) -> list[torch.Tensor]:
    """Cut a text file into chunks of ids. Each chunk begins with the tokenizer's BOS token, if it has one.

    Args:
        text: a text file in UTF-8.
        tokenizer: a tokenizer of transformers.
        chunks: the largest number of chunks; two are the least.
        length: the tokens of a chunk, BOS included; two are the least.

    Returns:
        Ids of consecutive chunks of the text, each int64 (1, length).

    Raises:
        Lfm2Error: the text cannot be read, or fewer than two chunks are asked for or fit into the text.
    """
    if chunks < 2 or length < 2:
        raise Lfm2Error(f"{chunks} chunks of {length} tokens cannot be compared. Ask for two or more of each.")
    written = read_text(text)
    first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids = torch.tensor(tokenizer(written, add_special_tokens=False, verbose=False).input_ids, dtype=torch.int64)
    step = length - len(first)
    pieces = [torch.cat([torch.tensor(first, dtype=torch.int64), piece])[None] for piece in ids.split(step)[:chunks]]
    if pieces and pieces[-1].shape[1] < length:
        pieces.pop()
    if len(pieces) < 2:
        raise Lfm2Error(
            f"{text} has {len(ids)} tokens, too few for two chunks of {length}. Give more text or shorter chunks."
        )
    return pieces
