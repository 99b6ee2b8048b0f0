"""Compare an exported encoder with its checkpoint on a text: the cosine of their vectors, and their top choices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from tqdm import tqdm
from transformers.utils import CONFIG_NAME

from optimum_lfm2.errors import Lfm2Error, first_line, read_object
from optimum_lfm2.families import MODEL_TYPES, member_of
from optimum_lfm2.loading.models import materialize_buffers
from optimum_lfm2.loading.source import is_ours
from optimum_lfm2.loading.tasks_manager import Lfm2TasksManager
from optimum_lfm2.quality.scoring import onnx_file, open_session
from optimum_lfm2.quality.words import legend, loss_in_words
from optimum_lfm2.validation.streamed import StandIns, streamed


HIDDEN = "last_hidden_state"
# The mean cosine above which a loss is none that shows, next to none, slight, noticeable.
COSINE_BOUNDS = (0.99999, 0.999, 0.99, 0.9)
VALUES_A_PASS = 1 << 26  # output values that a pass of the reference may give; bounds its memory


class Encoder(Protocol):
    """A model that is compared.

    Attributes:
        has_head: whether its vectors are logits.
    """

    has_head: bool

    def __call__(self, chunks: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Take chunks of ids, int64 (1, length) each, and yield the vectors of each: (vectors, width)."""


@dataclass(frozen=True)
class Similarity:
    """The figures that are measured for an encoder.

    Attributes:
        cosine: the mean cosine of the model's vectors and the reference's: one of each token, or of each chunk for a
            classifier of texts. The vectors are final hidden states, or logits where there is a head.
        cosine_p1: its first percentile: 1 % of the vectors are less alike.
        agreement: the share of vectors of logits whose largest entry is the same. None without a head.
        chunks, vectors: how many of them were compared.
    """

    cosine: float
    cosine_p1: float
    agreement: float | None
    chunks: int
    vectors: int

    def as_dict(self) -> dict[str, float | int | None]:
        """Return the figures by name, ready for JSON."""
        return asdict(self)

    @property
    def loss(self) -> str:
        """The loss of quality in words."""
        return loss_in_words(1 - self.cosine, [1 - bound for bound in COSINE_BOUNDS])

    def summary(self) -> str:
        """Return the main figures in one line."""
        return f"{self.loss} (cosine {self.cosine:.5f}, 1st percentile {self.cosine_p1:.5f})"

    def cells(self) -> dict[str, str]:
        """Return what a model card says of a file, by the heading of the column."""
        cells = {"loss": self.loss, "cosine": f"{self.cosine:.5f}", "1st percentile": f"{self.cosine_p1:.5f}"}
        return cells if self.agreement is None else cells | {"same top choice": f"{self.agreement:.2%}"}

    def measured(self, text: str) -> str:
        """Return how a model card says that the figures were measured on a text of this name."""
        return (
            "The cosine of the vectors with those of the checkpoint in fp32, its mean and its 1st percentile, is from "
            f"`optimum-cli lfm2 evaluate`, on {self.vectors} vectors of `{text}`. "
            f"{legend(COSINE_BOUNDS, 'mean cosine', above=True)}"
        )

    def table(self) -> str:
        """Return the figures as lines of text for a terminal."""
        rows = [("mean cosine", f"{self.cosine:.6f}"), ("1st percentile", f"{self.cosine_p1:.6f}")]
        if self.agreement is not None:
            rows.append(("same top choice", f"{self.agreement:.2%}"))
        rows.append(("loss", self.loss))
        rows.append(("vectors compared", f"{self.vectors} in {self.chunks} chunks"))
        return "\n".join(f"{name:<20}{value:>22}" for name, value in rows)


def encodes(path: Path) -> bool:
    """Return whether a checkpoint, an exported folder or an ONNX file is of an encoder, by the config.json there."""
    folders = (path, path.parent) if path.is_dir() else (path.parent, path.parent.parent)
    for folder in folders:
        if (folder / CONFIG_NAME).is_file():
            try:
                config = read_object(folder / CONFIG_NAME)
            except Lfm2Error:
                return False  # whoever loads the model says what is wrong
            return config.get("model_type") in MODEL_TYPES and member_of(config).encodes
    return False


def load_encoder(path: Path) -> Encoder:
    """Load an ONNX file, a folder that holds one, or a checkpoint.

    Raises:
        Lfm2Error: the path holds none of these or several ONNX files, or the model cannot be loaded.
    """
    file = onnx_file(path)
    if file is not None:
        return OnnxEncoder(file)
    if not is_ours(path):
        raise Lfm2Error(f"{path} holds neither an ONNX file nor an encoder of LFM2. Give a folder that does.")
    return reference_encoder(Lfm2TasksManager.get_model_from_task(_task(path), str(path), torch_dtype=torch.float32))


def _task(folder: Path) -> str:
    return Lfm2TasksManager.infer_task_from_model(str(folder))


class OnnxEncoder:
    """An ONNX encoder with the inputs `input_ids` and `attention_mask`.

    Args:
        path: the ONNX file.

    Raises:
        Lfm2Error: the file cannot be loaded or has other inputs. Calling it raises it where the graph fails.
    """

    def __init__(self, path: Path) -> None:
        self._session = open_session(path)
        self._path = path
        if strange := {value.name for value in self._session.get_inputs()} ^ {"input_ids", "attention_mask"}:
            raise Lfm2Error(f"{path} is no encoder: {', '.join(sorted(strange))} among its inputs. Export it again.")
        self.has_head = self._session.get_outputs()[0].name != HIDDEN

    def __call__(self, chunks: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        for ids in chunks:
            feeds = {"input_ids": ids.numpy(), "attention_mask": np.ones(ids.shape, dtype=np.int64)}
            try:
                output = self._session.run(None, feeds)[0]
            except Exception as error:  # onnxruntime's errors have no common class of their own
                raise Lfm2Error(f"{self._path} cannot run ({first_line(error)}). Export it again.") from None
            yield torch.from_numpy(output).reshape(-1, output.shape[-1])


def reference_encoder(model: Any) -> Encoder:
    """Wrap a float32 model of `Lfm2TasksManager` as a reference. Its layers are read one at a time."""
    return _StreamedEncoder(model)


class _StreamedEncoder:
    def __init__(self, model: Any) -> None:
        materialize_buffers(model)
        self._model = model
        self._weights = StandIns(model, model.checkpoint, scheme=None)
        head = model.source.member.heads[model.source.task]
        self.has_head = head.output != HIDDEN
        self._width = int(head.axes(model.config)[-1])
        self._chunks: Sequence[torch.Tensor] | None = None
        self._outputs: list[torch.Tensor] = []

    @torch.no_grad()
    def __call__(self, chunks: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        if self._chunks is not chunks:
            rows = max(1, VALUES_A_PASS // (self._width * chunks[0].shape[1]))
            self._chunks, self._outputs = chunks, []
            for group in torch.cat(list(chunks)).split(rows):
                with streamed(self._model, self._weights):
                    self._outputs += [row.reshape(-1, self._width) for row in self._model(group)[0]]
        yield from self._outputs


def compare_encoders(own: Encoder, gold: Encoder, pieces: Sequence[torch.Tensor]) -> Similarity:
    """Compare the encoder `own` with the reference `gold` on chunks of ids, each int64 (1, length).

    Raises:
        Lfm2Error: the outputs differ in shape, or are not finite.
    """
    cosines, same = [], 0
    progress = tqdm(pieces, desc="Comparing", unit="chunk", disable=None, leave=False)
    for _, values, expected in zip(progress, own(pieces), gold(pieces), strict=True):
        if values.shape != expected.shape:
            raise Lfm2Error(
                f"The outputs of the two models differ in shape: {tuple(values.shape)} and {tuple(expected.shape)}. "
                "Compare an export with its own checkpoint."
            )
        cosines.append(torch.cosine_similarity(values.double(), expected.double(), dim=1))
        same += int((values.argmax(1) == expected.argmax(1)).sum())
    alike = torch.cat(cosines)
    if not alike.isfinite().all():
        raise Lfm2Error("The outputs are not finite numbers. A float16 model may have overflowed: export it in fp32.")
    return Similarity(
        cosine=float(alike.mean()),
        cosine_p1=float(alike.quantile(0.01)),
        agreement=same / len(alike) if own.has_head else None,
        chunks=len(pieces),
        vectors=len(alike),
    )
