"""The weights of experts: read one expert at a time, from either form of a checkpoint, and written so."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor

from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.weights.blocks import Blocks, pack, quantize_tensor
from optimum_lfm2.weights.checkpoint import Checkpoint


# What transformers packs into one parameter of all experts, by the names that each expert's own tensors have on disk.
PACKED = {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}
PART = re.compile(r".*\.experts\.\d+\.w[123]\.weight")


def is_packed(name: str) -> bool:
    """Whether a parameter holds a matrix of every expert."""
    owner, _, kind = name.rpartition(".")
    return kind in PACKED and owner.endswith(".experts")


def is_part(name: str) -> bool:
    """Whether a stored tensor is one expert's own: `….experts.3.w1.weight`."""
    return bool(PART.fullmatch(name))


class ExpertWeights(Sequence[torch.Tensor]):
    """One matrix of every expert, (experts, out, in): each is read when it is asked for, and not kept."""

    def __init__(self, read: Callable[[int], torch.Tensor], shape: torch.Size) -> None:
        self._read = read
        self.shape = shape

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= int(index) < len(self):
            raise IndexError(index)
        return self._read(int(index))


def whole(weight: torch.Tensor | ExpertWeights) -> torch.Tensor:
    """A parameter with all its experts in memory."""
    return torch.stack(list(weight)) if isinstance(weight, ExpertWeights) else weight


class MoeCheckpoint(Checkpoint):
    """A checkpoint with experts: `ExpertWeights` stand for a packed parameter, whether it lies packed or in parts."""

    def _stored_name(self, name: str) -> str:
        """Of experts in parts the name up to the expert's number."""
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
            raise Lfm2Error(
                f"The checkpoint has no tensor {missing[0]}, which its config.json asks for. Is it complete?"
            )
        return dict.fromkeys(parts, (outputs * experts // len(parts), inputs))

    def _parts(self, name: str, index: int) -> list[str]:
        kind = name.rpartition(".")[2]
        return [f"{self._stored[name]}.{index}.{part}.weight" for part in PACKED[kind]]

    def __getitem__(self, name: str) -> Any:
        if not is_packed(name):
            return super().__getitem__(name)
        return ExpertWeights(lambda index: self._expert(name, index), self._parameters[name].shape)

    def _expert(self, name: str, index: int) -> torch.Tensor:
        stored, dtype = self._stored[name], self._parameters[name].dtype
        if stored in self._files:
            return self._read(stored, dtype, index)
        return torch.cat([self._read(part, dtype) for part in self._parts(name, index)])


def interleaved(weight: torch.Tensor) -> torch.Tensor:
    """Rows of gate then up, (2 * width, in) → a row of the one, a row of the other, as the operators read them."""
    return weight.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1).contiguous()


class ExpertsTensor(ir.LazyTensor):
    """An initializer of one part for each expert, written without holding more than one of them."""

    def __init__(
        self, parts: Callable[[], Iterator[torch.Tensor]], dtype: ir.DataType, shape: ir.Shape, name: str
    ) -> None:
        super().__init__(lambda: TorchTensor(torch.stack(list(parts()))), dtype=dtype, shape=shape, name=name)
        self._parts = parts

    def tofile(self, file: Any) -> None:
        for part in self._parts():
            TorchTensor(part).tofile(file)


class QuantizedExperts:
    """Codes and scales of one matrix of every expert.

    Two initializers come of it, the codes first: until the scales are written, they are kept.

    Args:
        matrices: an iterator over the experts, (out, in) each, with every call.
    """

    def __init__(self, matrices: Callable[[], Iterator[torch.Tensor]], blocks: Blocks) -> None:
        self._matrices = matrices
        self._blocks = blocks
        self._scales: list[torch.Tensor] = []

    def codes(self) -> Iterator[torch.Tensor]:
        """For each expert uint8, (out, in * bits / 8)."""
        self._scales = []
        for matrix in self._matrices():
            codes, scales = quantize_tensor(matrix, self._blocks)
            self._scales.append(scales)
            yield pack(codes, self._blocks).flatten(1)

    def scales(self) -> Iterator[torch.Tensor]:
        """For each expert (out, in / block_size)."""
        if not self._scales:
            for _ in self.codes():
                pass
        scales, self._scales = self._scales, []
        yield from scales
