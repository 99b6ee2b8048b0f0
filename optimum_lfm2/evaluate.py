"""How far an export is from its checkpoint: perplexity, KL divergence and top-1 agreement on chunks of text.

Both models read the same chunks; the second half of each is scored, where the model has seen enough to predict.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from optimum_lfm2 import compat
from optimum_lfm2.caches import LOGITS_TO_KEEP
from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.export.loading import Lfm2TasksManager, materialize_buffers
from optimum_lfm2.export.streamed import StandIns, streamed


# chunks, ids (1, length) each → of each in turn the logits to score, float (scored(ids), vocabulary)
Model = Callable[[Sequence[torch.Tensor]], Iterator[torch.Tensor]]

MOE = "lfm2_moe"
TOKENS_AT_ONCE = 64  # in double precision: bounds the memory of the comparison
TOKENS_A_PASS = 8192  # through a model that is read layer by layer: bounds the memory of what a layer computes
DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


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
    pieces = read_chunks(text, _tokenizer(reference, model), chunks, length)
    return measure(load(model), load(reference), pieces)


def measure(own: Model, gold: Model, pieces: Sequence[torch.Tensor]) -> Quality:
    """Compare two models on chunks, each int64 (1, length)."""
    progress = tqdm(pieces, desc="Comparing", unit="chunk", disable=None, leave=False)
    compared = zip(progress, own(pieces), gold(pieces), strict=True)
    return summarise(compare(logits, reference, ids[0]) for ids, logits, reference in compared)


def scored(ids: torch.Tensor) -> int:
    """How many logits the second half of a chunk takes: those before each of its tokens, and after the last."""
    return ids.shape[1] - ids.shape[1] // 2 + 1


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
        perplexity=math.exp(sum(chunk.loss for chunk in chunks) / tokens),
        reference_perplexity=math.exp(sum(chunk.reference_loss for chunk in chunks) / tokens),
        kl_divergence=float(divergences.mean()),
        kl_divergence_error=float(divergences.std(ddof=1) / len(chunks) ** 0.5),
        top1_agreement=sum(chunk.agreements for chunk in chunks) / tokens,
        chunks=len(chunks),
        tokens=tokens,
    )


def load(path: Path) -> Model:
    """The model of an ONNX file, of a folder that holds one, or of a checkpoint.

    Raises:
        Lfm2Error: for a path that holds none of these, or several ONNX files.
    """
    if not path.exists():
        raise Lfm2Error(f"{path} does not exist. Give an exported folder, an .onnx file or a checkpoint's folder.")
    if path.is_file():
        return _OnnxModel(path)
    files = onnx_files(path)
    if len(files) > 1:
        raise Lfm2Error(f"{path} holds several models. Give one of them: {', '.join(map(str, files))}.")
    return _OnnxModel(files[0]) if files else _transformers_model(path)


def onnx_files(folder: Path) -> list[Path]:
    """The ONNX files of a folder, and of its `onnx` folder."""
    return sorted([*folder.glob("*.onnx"), *folder.glob("onnx/*.onnx")])


class _OnnxModel:
    """A decoder with or without caches, of this package or others': the caches start out empty."""

    def __init__(self, path: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        # torch computes between the calls: threads that spin would hold the cores
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime has a class for each status, and no common one
            raise Lfm2Error(f"{path} cannot be loaded ({' '.join(str(error).split())}). Export it again.") from None
        self._inputs = {value.name: value for value in self._session.get_inputs()}
        self._path = path
        if "logits" not in (output.name for output in self._session.get_outputs()):
            raise Lfm2Error(f"{path} has no output named logits. Export it for text-generation.")

    def __call__(self, chunks: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        for ids in chunks:
            feeds = {name: self._feed(value, ids) for name, value in self._inputs.items()}
            try:
                (logits,) = self._session.run(["logits"], feeds)
            except Exception as error:  # as above
                raise Lfm2Error(f"{self._path} fails on a text with empty caches ({_first_line(error)}).") from None
            yield torch.from_numpy(logits[0, -scored(ids) :])

    def _feed(self, value: Any, ids: torch.Tensor) -> np.ndarray:
        if value.name == "input_ids":
            return ids.numpy()
        if value.name == "attention_mask":
            return np.ones(ids.shape, dtype=np.int64)
        if value.name == "position_ids":
            return np.arange(ids.shape[1], dtype=np.int64)[None]
        if value.name == LOGITS_TO_KEEP:
            return np.array(scored(ids), dtype=np.int64)
        if value.name.startswith("past") and value.type in DTYPES:
            shape = [axis if isinstance(axis, int) else int(axis == value.shape[0]) for axis in value.shape]
            return np.zeros(shape, dtype=DTYPES[value.type])
        raise Lfm2Error(f"{self._path} has an input {value.name}, which no language model's export that we know has.")


def _transformers_model(folder: Path) -> Model:
    try:
        config = AutoConfig.from_pretrained(folder)
        compat.check_model_type(config.model_type)
        if config.model_type == MOE:
            task = "text-generation"
            return reference_model(Lfm2TasksManager.get_model_from_task(task, str(folder), torch_dtype=torch.float32))
        compat.spell_rope_for_both(config)
        model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32).eval()
    except Lfm2Error:
        raise
    except (OSError, ValueError) as error:
        raise Lfm2Error(f"{folder} holds neither an ONNX file nor a checkpoint ({_first_line(error)}).") from None
    return _WholeModel(model)


def reference_model(model: Any) -> Model:
    """A model of `Lfm2TasksManager`, in float32: read as a whole, but for experts, which may be larger than memory."""
    weights = getattr(model, "checkpoint", None)
    if model.config.model_type == MOE and weights is not None:
        return _StreamedModel(model, weights)
    return _WholeModel(model.to("cpu"))


class _WholeModel:
    """A model of transformers, as it is."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    def __call__(self, chunks: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        for ids in chunks:
            yield self._logits(ids)

    @torch.no_grad()
    def _logits(self, ids: torch.Tensor) -> torch.Tensor:
        return self._model(input_ids=ids, use_cache=False, logits_to_keep=scored(ids)).logits[0]


class _StreamedModel:
    """A model of transformers on the meta device: many chunks go through each layer while its weights are there.

    They are read once, however many models are compared on the same chunks: the hidden states that are scored stay.
    """

    def __init__(self, model: Any, weights: Mapping[str, Any]) -> None:
        materialize_buffers(model)
        self._model = model
        self._weights = StandIns(model, weights, scheme=None)
        self._chunks: Sequence[torch.Tensor] | None = None
        self._hidden: list[torch.Tensor] = []

    def __call__(self, chunks: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        if self._chunks is not chunks:
            self._chunks, self._hidden = chunks, self._read(chunks)
        for hidden in self._hidden:
            yield self._logits(hidden)

    def _read(self, chunks: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Of each chunk the hidden states whose logits are scored."""
        groups = torch.cat(list(chunks)).split(max(1, TOKENS_A_PASS // chunks[0].shape[1]))
        total, count = len(groups) * len(self._model.model.layers), scored(chunks[0])
        with tqdm(total=total, desc="Reference", unit="layer", disable=None, leave=False) as bar:
            states = (hidden for group in groups for hidden in self._hidden_states(group, bar))
            return [hidden[-count:].clone() for hidden in states]

    @torch.no_grad()
    def _hidden_states(self, ids: torch.Tensor, bar: tqdm) -> torch.Tensor:
        def count(*_: Any) -> None:
            bar.update()

        with streamed(self._model, self._weights), ExitStack() as stack:
            for layer in self._model.model.layers:
                stack.callback(layer.register_forward_hook(count).remove)
            return self._model.model(input_ids=ids, use_cache=False).last_hidden_state

    @torch.no_grad()
    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        with streamed(self._model, self._weights):
            return self._model.lm_head(hidden)


def _tokenizer(*folders: Path) -> Any:
    """The first tokenizer that lies with a model."""
    for path in folders:
        candidates = (path, path.parent) if path.is_dir() else (path.parent, path.parent.parent)
        for folder in candidates:
            if (folder / "tokenizer_config.json").is_file():
                try:
                    return AutoTokenizer.from_pretrained(folder)
                except (OSError, ValueError) as error:
                    raise Lfm2Error(f"The tokenizer in {folder} cannot be loaded ({_first_line(error)}).") from None
    raise Lfm2Error(f"Neither {' nor '.join(map(str, folders))} has a tokenizer. Copy the checkpoint's beside it.")


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


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
