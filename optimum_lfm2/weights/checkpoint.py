"""A safetensors checkpoint, checked by its headers and read one tensor at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from optimum_lfm2.errors import Lfm2Error


BASE_PREFIX = "model."
FINGERPRINT_ROWS = 16


class Checkpoint(Mapping[str, torch.Tensor]):
    """The parameters of `model`, each read and converted when it is asked for, and not kept.

    Args:
        files: the file of each tensor, by the tensor's name.
        model: a model on the meta device: its parameters' names, shapes and dtype are what the files must hold.

    Raises:
        Lfm2Error: for a tensor that is missing or has another shape, or a file that cannot be read.
    """

    # Parts of names that transformers changes when it reads a checkpoint: its own, and as files have it too.
    RENAMED: ClassVar[Mapping[str, str]] = {}

    def __init__(self, files: Mapping[str, Path], model: torch.nn.Module) -> None:
        self._files = files
        self._parameters = stored_tensors(model)
        self._stored = {name: self._stored_name(first) for name, first in tied_names(model).items()}
        self._check_headers()

    def _stored_name(self, name: str) -> str:
        """A decoder's parameters begin with `model.` where it was saved under a head."""
        renamed = name
        for own, stored in self.RENAMED.items():
            renamed = renamed.replace(own, stored)
        for spelled in (name, renamed):
            for candidate in (spelled, BASE_PREFIX + spelled, spelled.removeprefix(BASE_PREFIX)):
                if candidate in self._files:
                    return candidate
        raise Lfm2Error(
            f"The checkpoint has no tensor {name}, which its config.json asks for. Is it complete, and of this model?"
        )

    def _check_headers(self) -> None:
        shapes: dict[str, list[int]] = {}
        for path in sorted(set(self._files.values())):
            with _opened(path) as file:
                shapes |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118  not a dict
        for stored, shape in (needed for name in self._parameters for needed in self._needed(name).items()):
            if stored not in shapes:
                raise Lfm2Error(
                    f"{self._files[stored]} has no tensor {stored}, though the checkpoint's index names it."
                )
            if tuple(shapes[stored]) != shape:
                raise Lfm2Error(
                    f"{stored} in {self._files[stored]} has the shape {tuple(shapes[stored])}; the checkpoint's "
                    f"config.json asks for {shape}. One of the two belongs to another model."
                )

    def _needed(self, name: str) -> dict[str, tuple[int, ...]]:
        """The shape of each stored tensor that a parameter is made of."""
        return {self._stored[name]: tuple(self._parameters[name].shape)}

    def __getitem__(self, name: str) -> Any:
        return self._read(self._stored[name], self._parameters[name].dtype)

    def _read(self, stored: str, dtype: torch.dtype, index: int | None = None) -> torch.Tensor:
        """A stored tensor, or one entry of it along the first axis, as `dtype`."""
        # Opened for each tensor: a mapping that lives on keeps every page that was read in memory.
        with _opened(self._files[stored]) as file:
            weight = file.get_tensor(stored) if index is None else file.get_slice(stored)[index]
        converted = weight.to(dtype, copy=True)
        if not converted.isfinite().all():
            kind = str(converted.dtype).removeprefix("torch.")
            remedy = f"too large for {kind}. Use --dtype fp32." if weight.isfinite().all() else "not finite numbers."
            raise Lfm2Error(f"{stored} in {self._files[stored]} holds values that are {remedy}")
        return converted

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


def stored_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What a checkpoint of the model holds, by name: parameters, under each of their names, and lasting buffers."""
    lasting = model.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in lasting}
    return {**dict(model.named_parameters(remove_duplicate=False)), **buffers}


def tied_names(model: torch.nn.Module) -> dict[str, str]:
    """For each stored tensor's name the first name of the same tensor: its own, unless it is tied."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name) for name, tensor in stored_tensors(model).items()}


def find_tensors(model_name_or_path: str, **hub: Any) -> dict[str, Path] | None:
    """The file of each tensor of a safetensors checkpoint, by name; None where it has no safetensors files.

    Args:
        hub: `subfolder`, `revision`, `cache_dir`, `token` and the like, as `transformers.utils.cached_file` takes them.
    """

    def found(name: str) -> Path | None:
        path = cached_file(model_name_or_path, name, _raise_exceptions_for_missing_entries=False, **hub)
        return None if path is None else Path(path)

    if (index := found(SAFE_WEIGHTS_INDEX_NAME)) is not None:
        weight_map = json.loads(index.read_text())["weight_map"]
        shards = {shard: found(shard) for shard in sorted(set(weight_map.values()))}
        for shard, path in shards.items():
            if path is None:
                raise Lfm2Error(f"{model_name_or_path} has no file {shard}, which {index.name} names.")
        return {name: shards[shard] for name, shard in weight_map.items()}
    if (single := found(SAFE_WEIGHTS_NAME)) is not None:
        with _opened(single) as file:
            return dict.fromkeys(file.keys(), single)
    return None


def fingerprint(files: Mapping[str, Path]) -> str:
    """Tells checkpoints of one shape apart, a fine-tune and what it was made of: a hash of each tensor's first rows."""
    digest = hashlib.sha256()
    for name in sorted(files):
        with _opened(files[name]) as file:
            rows = file.get_slice(name)[:FINGERPRINT_ROWS].contiguous()
        digest.update(name.encode() + rows.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise Lfm2Error(f"{path} is not a complete safetensors file ({error}). Download or copy it again.") from None
