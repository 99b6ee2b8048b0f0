"""Reading a checkpoint, of safetensors or GGUF: its headers are checked first, then tensors are read one at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
)

from optimum_lfm2.errors import Lfm2Error, read_object
from optimum_lfm2.weights.blocks import Blocks
from optimum_lfm2.weights.gguf import DENSE, FLOATS, GRIDS, SUFFIX, GgufFile


# What transformers reads besides: pickles, to which it adds random weights where a tensor is missing.
OTHER_WEIGHTS = (WEIGHTS_INDEX_NAME, WEIGHTS_NAME)
# In a folder that stands for a GGUF file, a link to it (`loading.gguf`).
GGUF_LINK = f"model{SUFFIX}"

# Parts of names that other programs put into a checkpoint, with whose they are and what to do.
_MERGE = "Load it with peft, and save what its merge_and_unload() returns."
_UNWRAP = "Save the model inside, as accelerate's unwrap_model() returns it."
_ORIGINAL = "Export the checkpoint that it was converted from."
FOREIGN_NAMES = {
    "._orig_mod.": ("torch.compile", "Save the model that was compiled, which is its _orig_mod."),
    ".base_model.model.": ("peft", _MERGE),
    ".base_layer.": ("peft", _MERGE),
    ".lora_": ("peft", _MERGE),
    "._fsdp_wrapped_module.": ("FSDP", _UNWRAP),
    "._checkpoint_wrapped_module.": ("FSDP", _UNWRAP),
    "._forward_module.": ("Lightning Fabric", _UNWRAP),
    ".module.": ("torch's DataParallel", _UNWRAP),
    ".switch_mlp.": ("MLX", _ORIGINAL),
}
# Buffers that older releases stored. They follow from the configuration.
COMPUTED = ("inv_freq", "original_inv_freq", "position_ids")
POINTER = b"version https://git-lfs"  # how a file begins that Git LFS has not fetched


class Checkpoint(Mapping[str, torch.Tensor]):
    """The parameters of a model. Each is read from its file and converted when it is asked for; none is kept.

    Args:
        files: for each stored tensor's name, its file.
        model: a model on the meta device. Its parameters say which names and shapes the files must hold, and to which
            dtype a tensor is converted.

    Raises:
        Lfm2Error: a tensor is missing or has another shape, or a file cannot be read. Reading a tensor raises it where
            the values are not finite in the wanted dtype.
    """

    # What the names of a decoder begin with where it is stored together with its head.
    PREFIXES: ClassVar[tuple[str, ...]] = ("model.",)
    # Parts of names that transformers changes when it reads a checkpoint: its own, and as files have it too.
    RENAMED: ClassVar[Mapping[str, str]] = {}

    def __init__(self, files: Mapping[str, Path], model: torch.nn.Module) -> None:
        self._files = files
        self._parameters = stored_tensors(model)
        self._tied = tied_names(model)
        self._stored = {name: self._stored_once(first) for name, first in self._tied.items()}
        self._check_headers()
        # What an export has rounded of `kinds`: how it is stored, and how far it is off (`coded.what_was_rounded`).
        self.rounded_again: dict[str, tuple[Blocks, float]] = {}

    def _stored_once(self, first: str) -> str:
        """Find the name under which a parameter is stored. A tied one may be stored under any of its names."""
        try:
            return self._stored_name(first)
        except Lfm2Error:
            others = [name for name, tied_to in self._tied.items() if tied_to == first and name in self._files]
            if not others:
                raise
            return others[0]

    def _stored_name(self, name: str) -> str:
        """Find the name under which a parameter is stored.

        A decoder that was saved together with its head has a prefix, one saved alone has not.
        """
        renamed = name
        for own, stored in self.RENAMED.items():
            renamed = renamed.replace(own, stored)
        for spelled in (name, renamed):
            bare = spelled
            for prefix in self.PREFIXES:
                bare = bare.removeprefix(prefix)
            for candidate in (spelled, *(prefix + bare for prefix in self.PREFIXES), bare):
                if candidate in self._files:
                    return candidate
        raise self._missing(name)

    def _missing(self, name: str) -> Lfm2Error:
        """Return the error for a tensor that is not stored. It says so where another program changed the names."""
        for marker, (program, remedy) in FOREIGN_NAMES.items():
            if stored := next((stored for stored in self._files if marker in f".{stored}"), None):
                return Lfm2Error(
                    f"The checkpoint has no tensor {name}, but {stored}: such names are of {program}. {remedy}"
                )
        return Lfm2Error(
            f"The checkpoint has no tensor {name}, which its config.json asks for. "
            "Download or copy the checkpoint again, with its own config.json."
        )

    def _check_headers(self) -> None:
        shapes: dict[str, list[int]] = {}
        for path in sorted(set(self._files.values())):
            with _opened(path) as file:
                shapes |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118  not a dict
        needed = {stored: shape for name in self._parameters for stored, shape in self._needed(name).items()}
        self._unread = sorted(self._files.keys() - needed.keys())
        for stored, shape in needed.items():
            if stored not in shapes:
                raise Lfm2Error(
                    f"{self._files[stored]} has no tensor {stored}, though the checkpoint's index names it."
                )
            if len(shape) == 3 and tuple(shapes[stored]) == (shape[0], shape[2], shape[1]) != shape:
                raise Lfm2Error(
                    f"{stored} in {self._files[stored]} has the shape {tuple(shapes[stored])}, and transformers' is "
                    f"{shape}: such kernels are of MLX. {_ORIGINAL}"
                )
            if tuple(shapes[stored]) != shape:
                raise Lfm2Error(
                    f"{stored} in {self._files[stored]} has the shape {tuple(shapes[stored])}; the checkpoint's "
                    f"config.json asks for {shape}. One of the two belongs to another model."
                )

    def _needed(self, name: str) -> dict[str, tuple[int, ...]]:
        """Return the stored tensors that a parameter is read from, each with the shape that it must have."""
        return {self._stored[name]: tuple(self._parameters[name].shape)}

    @property
    def unread(self) -> list[str]:
        """The names of the stored tensors that no parameter is read from, in order.

        Those that change nothing are left out: buffers that are computed, and copies of what they are tied to. So is
        what is read elsewhere: the dense layer in a GGUF file of an encoder.
        """
        elsewhere = {DENSE} if any(path.suffix == SUFFIX for path in self._files.values()) else set()
        names = [name for name in self._unread if name not in elsewhere]
        return [name for name in names if name.split(".")[-1] not in COMPUTED and not self._is_copy(name)]

    @property
    def second_head(self) -> str | None:
        """The name of a tensor that is stored with other values than the one that it is tied to. None for none."""
        return next((name for name in self._unread if name in self._stored and not self._is_copy(name)), None)

    @cached_property
    def kinds(self) -> dict[str, str]:
        """The type of each matrix that a GGUF file stores in codes, by the parameter's name."""
        files = {path: GgufFile.open(path) for path in set(self._files.values()) if path.suffix == SUFFIX}
        if not files:
            return {}
        kinds = {name: self._kind(name, files) for name in self._stored}
        return {name: kind for name, kind in kinds.items() if kind not in (None, *FLOATS)}

    def _kind(self, name: str, files: Mapping[Path, GgufFile]) -> str | None:
        """Return the type of a matrix in a GGUF file. None for what is no matrix."""
        return self._stored_kind(self._stored[name], files) if self._parameters[name].dim() == 2 else None

    def _stored_kind(self, stored: str, files: Mapping[Path, GgufFile]) -> str:
        return files[self._files[stored]].tensors[stored].kind

    @property
    def grids(self) -> dict[str, Blocks | None]:
        """How ONNX stores the codes of each matrix of `kinds` as they are. None where it cannot."""
        return {name: GRIDS[kind].blocks if kind in GRIDS else None for name, kind in self.kinds.items()}

    def codes(self, name: str, expert: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Read the codes and scales of a matrix that has a grid, as `quantize_tensor` returns them. Scales are float32.

        Args:
            name: of the parameter.
            expert: which matrix of a parameter that has one for each expert (`MoeCheckpoint`).

        Raises:
            Lfm2Error: a scale is no finite number.
        """
        return self._codes(self._stored[name])

    def _codes(self, stored: str) -> tuple[torch.Tensor, torch.Tensor]:
        path = self._files[stored]
        codes, scales = GgufFile.open(path).get_codes(stored)
        if not is_finite(scales):
            raise Lfm2Error(f"{stored} in {path} holds values that are not finite numbers.")
        return codes, scales

    def _is_copy(self, name: str) -> bool:
        if name not in self._stored:
            return False
        tensors = []
        for stored in (name, self._stored[name]):
            with _opened(self._files[stored]) as file:
                tensors.append(file.get_tensor(stored))
        return torch.equal(*tensors)

    def __getitem__(self, name: str) -> Any:
        return self._read(self._stored[name], self._parameters[name].dtype)

    def _read(self, stored: str, dtype: torch.dtype, index: int | None = None) -> torch.Tensor:
        """Read a stored tensor as `dtype`: all of it, or one entry along the first axis."""
        # The file is opened anew for each tensor. A memory mapping that stays open keeps every page that was read.
        with _opened(self._files[stored]) as file:
            weight = file.get_tensor(stored) if index is None else file.get_slice(stored)[index]
        converted = weight.to(dtype, copy=True)
        if not is_finite(converted):
            kind = str(converted.dtype).removeprefix("torch.")
            remedy = f"too large for {kind}. Use --dtype fp32." if is_finite(weight) else "not finite numbers."
            raise Lfm2Error(f"{stored} in {self._files[stored]} holds values that are {remedy}")
        return converted

    def __contains__(self, name: object) -> bool:
        return name in self._stored  # Mapping's own reads the tensor to find out

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


def tensor_shape(path: Path, name: str) -> tuple[int, ...]:
    """Return the shape of a tensor of a file, as the file's header has it.

    Raises:
        Lfm2Error: the file is not complete.
    """
    with _opened(path) as file:
        return tuple(file.get_slice(name).get_shape())


def is_finite(tensor: torch.Tensor) -> bool:
    """Return whether all values of a tensor of any shape are finite numbers.

    `aminmax` gives NaN if one value is NaN. It is more than ten times as fast as `isfinite` (torch 2.13, CPU).
    """
    return all(bool(extreme.isfinite()) for extreme in tensor.aminmax())


def stored_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the tensors that a checkpoint of the model holds, by name.

    These are the persistent buffers and the parameters. A tied parameter is listed under each of its names.
    """
    lasting = model.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in lasting}
    return {**dict(model.named_parameters(remove_duplicate=False)), **buffers}


def tied_names(model: torch.nn.Module) -> dict[str, str]:
    """Map the name of each stored tensor to the first name of the same tensor. Only tied names differ from it."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name) for name, tensor in stored_tensors(model).items()}


def find_tensors(model_name_or_path: str, **hub: Any) -> dict[str, Path]:
    """Find the file of each tensor of a checkpoint.

    Args:
        model_name_or_path: the checkpoint's folder, or its id on the Hub.
        hub: arguments of `transformers.utils.cached_file`: `subfolder`, `revision`, `cache_dir`, `token` and so on.

    Returns:
        For each stored tensor's name its file.

    Raises:
        Lfm2Error: there are no files of weights, their index is broken, or a file is missing or not complete.
    """

    def found(name: str) -> Path | None:
        path = cached_file(model_name_or_path, name, _raise_exceptions_for_missing_entries=False, **hub)
        return None if path is None else Path(path)

    # As transformers: one file goes before an index.
    if (single := found(SAFE_WEIGHTS_NAME)) is not None:
        with _opened(single) as file:
            return dict.fromkeys(file.keys(), single)
    if (index := found(SAFE_WEIGHTS_INDEX_NAME)) is not None:
        weight_map = _weight_map(index)
        shards: dict[str, Path] = {}
        for shard in sorted(set(weight_map.values())):
            path = found(shard)
            if path is None:
                raise Lfm2Error(
                    f"{model_name_or_path} has no file {shard}, which {index.name} names. Download or copy it again."
                )
            shards[shard] = path
        return {name: shards[shard] for name, shard in weight_map.items()}
    if (link := found(GGUF_LINK)) is not None and link.is_symlink():
        path = link.readlink()  # errors name this one
        return dict.fromkeys(GgufFile.open(path).keys(), path)
    if other := next((name for name in OTHER_WEIGHTS if found(name) is not None), None):
        raise Lfm2Error(
            f"{model_name_or_path} has {other} and no safetensors. Convert it, in Python: AutoModelForCausalLM."
            f'from_pretrained("{model_name_or_path}").save_pretrained("{model_name_or_path}", safe_serialization=True)'
        )
    raise Lfm2Error(f"{model_name_or_path} has no weights: no {SAFE_WEIGHTS_NAME} and no {SAFE_WEIGHTS_INDEX_NAME}.")


def _weight_map(index: Path) -> dict[str, str]:
    """The shard of each tensor, all of them files beside the index."""
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise Lfm2Error(f"{index} has no weight_map, which says where each tensor is. Download or copy it again.")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not shard.endswith(".safetensors") or set(shard) & set("/\\\0"):
            raise Lfm2Error(
                f"{index} says that {name} is in {shard!r}, which is no safetensors file beside it. "
                "Download or copy it again."
            )
    return weight_map


def fingerprint(files: Mapping[str, Path]) -> str:
    """Return a hash of every tensor, whole, as 32 hexadecimal digits: it tells a fine-tune and its base model apart.

    Args:
        files: as `find_tensors` returns them. One tensor at a time is in memory.

    Raises:
        Lfm2Error: a file is not complete.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(files):
        with _opened(files[name]) as file:
            tensor = file.get_tensor(name)
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _opened(path: Path) -> Any:
    if path.suffix == SUFFIX:
        return GgufFile.open(path)
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        with path.open("rb") as file:
            pointer = file.read(len(POINTER)) == POINTER
        if pointer:
            raise Lfm2Error(f"{path} is a pointer of Git LFS and no weights. Run: git lfs pull") from None
        raise Lfm2Error(f"{path} is not a complete safetensors file ({error}). Download or copy it again.") from None
