"""The files of a model in parts, and the sessions of those that are no decoder."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from onnxruntime import InferenceSession
from optimum.onnxruntime.base import ORTSessionMixin

from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.file_names import DECODER, EMBEDDING, VISION
from optimum_lfm2.runtime.cache import Lfm2Cache
from optimum_lfm2.runtime.session import GraphSession


def part_files(files: Iterable[Path], file_name: str | None, where: object) -> dict[str, Path]:
    """Choose one file of each part, all of the same precision.

    Args:
        files: the ONNX files of the folder.
        file_name: the decoder's file. None takes the one without a suffix, or the only one.
        where: the folder or the id on the Hub, for the error.

    Returns:
        The file by the name of its part.

    Raises:
        Lfm2Error: a file is missing, or several decoders could be meant.
    """
    found = {file.name: file for file in sorted(files)}
    decoders = [name for name in found if name.startswith(DECODER)]
    if file_name is None:
        if not decoders:
            raise Lfm2Error(
                f"{where} has no {DECODER}.onnx. Export the checkpoint, or give a folder of Transformers.js' layout."
            )
        if f"{DECODER}.onnx" not in decoders and len(decoders) > 1:
            raise Lfm2Error(f'{where} holds {", ".join(decoders)}. Choose one, such as file_name="{decoders[0]}".')
        file_name = f"{DECODER}.onnx" if f"{DECODER}.onnx" in decoders else decoders[0]
    file_name = Path(file_name).name
    if not file_name.startswith(DECODER):
        raise Lfm2Error(f"file_name={file_name!r}: give the file of the decoder, such as {DECODER}_q4.onnx.")
    suffix = file_name.removeprefix(DECODER)
    names = {part: f"{part}{suffix}" for part in (DECODER, EMBEDDING, VISION)}
    if missing := [name for name in names.values() if name not in found]:
        raise Lfm2Error(f"{where} has no {' and no '.join(missing)}. Copy it there, or export the checkpoint again.")
    return {part: found[name] for part, name in names.items()}


class Part(ORTSessionMixin):
    """A session of Optimum, which knows its device and its files."""

    def __init__(self, session: InferenceSession) -> None:
        self.initialize_ort_attributes(session)

    def run(self, inputs: dict[str, torch.Tensor], output: str) -> torch.Tensor:
        """Run the session, and return one output on its device."""
        feeds = {name: tensor.numpy(force=True) for name, tensor in inputs.items()}
        (result,) = self.session.run([output], feeds)
        return torch.from_numpy(result).to(self.device)


class EmbeddedSession(GraphSession):
    """Runs a decoder that takes `inputs_embeds`.

    Its ids are those of the vocabulary, or `first` + i for the row i of the cache's `features`. So whatever shifts,
    cuts, repeats or records ids does the same to pictures.
    """

    features: torch.Tensor | None = None

    def with_embedding(self, embedding: Part, first: int) -> EmbeddedSession:
        """Set the embedding, and the id of the first feature. Return the session itself."""
        self._embedding, self._first = embedding, first
        return self

    def with_features(self, features: torch.Tensor) -> EmbeddedSession:
        """Return a copy that has features itself, (picture tokens, hidden_size), for caches that have none."""
        twin = copy.copy(self)
        twin.features = features
        return twin

    def _tokens(self, ids: torch.Tensor, cache: Lfm2Cache | None) -> dict[str, torch.Tensor]:
        pictured = ids >= self._first
        embeds = self._embedding.run({"input_ids": ids.masked_fill(pictured, 0)}, "inputs_embeds")
        if bool(pictured.any()):
            features = self.features if cache is None or cache.record.features is None else cache.record.features
            if features is None:
                raise Lfm2Error("The cache has lost the features of its pictures. Start without it.")
            embeds[pictured] = features[ids[pictured] - self._first].to(embeds.device)
        return {"inputs_embeds": embeds}


def picture_features(vision: Part, pieces: Iterable[Mapping[str, torch.Tensor]]) -> torch.Tensor:
    """Run the vision encoder piece by piece, so that memory does not grow with their number.

    Args:
        vision: its session.
        pieces: the inputs of each run by their names: float pixels first, then integers.

    Returns:
        float32 (picture tokens, hidden_size).
    """
    features = []
    for piece in pieces:
        (name, pixels), *others = piece.items()
        inputs = {name: pixels.float(), **{other: values.to(torch.int64) for other, values in others}}
        features.append(vision.run(inputs, "image_features"))
    return torch.cat(features)
