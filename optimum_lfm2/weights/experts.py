"""The weights of experts, read from a checkpoint and written to the ONNX file one expert at a time.

A checkpoint stores experts in one of two forms: packed, with one tensor for all experts of a layer, or in parts, with
tensors for each expert.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor

from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.weights.blocks import Blocks, pack
from optimum_lfm2.weights.checkpoint import Checkpoint
from optimum_lfm2.weights.gguf import GgufFile


# For each parameter that transformers packs for all experts: the names of one expert's tensors in the other form.
PACKED = {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}
PART = re.compile(r".*\.experts\.\d+\.w[123]\.weight")


def is_packed(name: str) -> bool:
    """Return whether the parameter of this name holds a matrix of every expert."""
    owner, _, kind = name.rpartition(".")
    return kind in PACKED and owner.endswith(".experts")


def is_part(name: str) -> bool:
    """Return whether a stored tensor belongs to one expert, as `….experts.3.w1.weight` does."""
    return bool(PART.fullmatch(name))


class ExpertWeights(Sequence[torch.Tensor]):
    """One matrix of every expert, (experts, out, in). Each matrix is read when it is asked for, and not kept.

    Args:
        read: reads the matrix of one expert, (out, in), by the expert's index.
        shape: (experts, out, in).
    """

    def __init__(self, read: Callable[[int], torch.Tensor], shape: torch.Size) -> None:
        self._read = read
        self.shape = shape

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= int(index) < len(self):
            raise IndexError(index)
        return self._read(int(index))


class MoeCheckpoint(Checkpoint):
    """A checkpoint with experts. Reading a packed parameter gives `ExpertWeights`, in either stored form."""

    def _stored_name(self, name: str) -> str:
        """Find the stored name. For experts stored in parts this is the name before the expert's number."""
        if not is_packed(name):
            return super()._stored_name(name)
        try:
            return super()._stored_name(name)
        except Lfm2Error:
            owner, _, kind = name.rpartition(".")
            first = f".0.{PACKED[kind][0]}.weight"
            return super()._stored_name(owner + first).removesuffix(first)

    def _needed(self, name: str) -> dict[str, tuple[int, ...]]:
        if self._stored[name] in self._files:
            return super()._needed(name)
        experts, outputs, inputs = self._parameters[name].shape
        parts = [part for index in range(experts) for part in self._parts(name, index)]
        if missing := [part for part in parts if part not in self._files]:
            raise self._missing(missing[0])
        return dict.fromkeys(parts, (outputs * experts // len(parts), inputs))

    def _parts(self, name: str, index: int) -> list[str]:
        kind = name.rpartition(".")[2]
        return [f"{self._stored[name]}.{index}.{part}.weight" for part in PACKED[kind]]

    def __getitem__(self, name: str) -> Any:
        if not is_packed(name):
            return super().__getitem__(name)
        return ExpertWeights(lambda index: self._expert(name, index), self._parameters[name].shape)

    def _kind(self, name: str, files: Mapping[Path, GgufFile]) -> str | None:
        """Return the type of the matrices of all experts. None where they have several."""
        if not is_packed(name):
            return super()._kind(name, files)
        parts = (part for index in range(len(self[name])) for part in self._parts(name, index))
        kinds = {self._stored_kind(part, files) for part in parts}
        return kinds.pop() if len(kinds) == 1 else None

    def codes(self, name: str, expert: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        if expert is None:
            return super().codes(name)
        codes, scales = zip(*map(self._codes, self._parts(name, expert)), strict=True)
        return torch.cat(codes), torch.cat(scales)

    def _expert(self, name: str, index: int) -> torch.Tensor:
        stored, dtype = self._stored[name], self._parameters[name].dtype
        if stored in self._files:
            return self._read(stored, dtype, index)
        return torch.cat([self._read(part, dtype) for part in self._parts(name, index)])


def interleaved(weight: torch.Tensor) -> torch.Tensor:
    """Interleave the rows of gate and up, as MoE and QMoE read them.

    Args:
        weight: (2 * width, in), all rows of gate and then all rows of up.

    Returns:
        (2 * width, in), a row of gate and a row of up in turn.
    """
    return weight.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1).contiguous()


class ExpertsTensor(ir.LazyTensor):
    """An initializer made of one part for each expert. Writing it holds one part in memory at a time.

    Args:
        parts: returns a new iterator over the parts with every call.
        dtype, shape, name: of the whole initializer; its first axis counts the experts.
    """

    def __init__(
        self, parts: Callable[[], Iterator[torch.Tensor]], dtype: ir.DataType, shape: ir.Shape, name: str
    ) -> None:
        super().__init__(lambda: TorchTensor(torch.stack(list(parts()))), dtype=dtype, shape=shape, name=name)
        self._parts = parts

    def tofile(self, file: Any) -> None:
        """Write the bytes of the parts to an open binary file."""
        for part in self._parts():
            TorchTensor(part).tofile(file)


class QuantizedExperts:
    """The codes and scales of one matrix of every expert, for two initializers.

    The codes are written first. The scales that come with them are kept until they are written too.

    Args:
        coded: returns a new iterator over the experts' codes and scales (`quantize_tensor`) with every call.
        blocks: how a matrix is stored.
    """

    def __init__(self, coded: Callable[[], Iterator[tuple[torch.Tensor, torch.Tensor]]], blocks: Blocks) -> None:
        self._coded = coded
        self._blocks = blocks
        self._scales: list[torch.Tensor] = []

    def codes(self) -> Iterator[torch.Tensor]:
        """Yield the packed codes of each expert, uint8 (out, in * bits / 8)."""
        self._scales = []
        for codes, scales in self._coded():
            self._scales.append(scales)
            yield pack(codes, self._blocks).flatten(1)

    def scales(self) -> Iterator[torch.Tensor]:
        """Yield the scales of each expert, (out, in / block_size) of the matrices' dtype."""
        if not self._scales:
            for _ in self.codes():
                pass
        scales, self._scales = self._scales, []
        yield from scales
