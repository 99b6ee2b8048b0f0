"""A GGUF file, read as if it were a safetensors file with transformers' names. Tensors are read one at a time.

The library `gguf` knows the bit layouts. It is imported when the first file is opened.
"""

from __future__ import annotations

import re
import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from importlib import import_module
from math import prod
from mmap import ACCESS_READ, mmap
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar

import numpy as np
import torch

from optimum_lfm2.errors import Lfm2Error, first_line
from optimum_lfm2.weights.blocks import Blocks


SUFFIX = ".gguf"
MAGIC = b"GGUF"
VERSIONS = (2, 3)
FLOATS = ("F32", "F16", "BF16", "F64")
AGAIN = "Download or copy it again."
BYTES_AT_ONCE = 1 << 22  # of a tensor whose codes are read


@dataclass(frozen=True)
class Grid:
    """A type whose values are code * scale, with one scale for each block and no offset.

    Attributes:
        blocks: the same grid in ONNX.
        ones: for ranges of the bytes of a stored block, the byte that makes every code 1. A value is then the scale.
    """

    blocks: Blocks
    ones: Mapping[tuple[int, int], int]


# A code of more than 4 bits, or that is read from a table, is stored in 8 bits. The layouts are those of ggml-common.h.
GRIDS = {
    "Q4_0": Grid(Blocks(4, 32), {(2, 18): 0x99}),
    "Q5_0": Grid(Blocks(8, 32), {(2, 6): 0xFF, (6, 22): 0x11}),
    "Q8_0": Grid(Blocks(8, 32), {(2, 34): 0x01}),
    "IQ4_NL": Grid(Blocks(8, 32), {(2, 18): 0x88}),
    "IQ4_XS": Grid(Blocks(8, 32), {(8, 136): 0x88}),
    "Q3_K": Grid(Blocks(4, 16), {(0, 32): 0xFF, (32, 96): 0x55}),
    "Q6_K": Grid(Blocks(8, 16), {(0, 128): 0x11, (128, 192): 0xAA}),
}

# Names of tensors: those of a GGUF file, and transformers'. In a layer, they follow `blk.3.` and `model.layers.3.`.
WHOLE = {"token_embd": "model.embed_tokens", "token_embd_norm": "model.embedding_norm", "output": "lm_head"}
LAYER = {
    "attn_norm": "operator_norm",
    "ffn_norm": "ffn_norm",
    "ffn_gate": "feed_forward.w1",
    "ffn_down": "feed_forward.w2",
    "ffn_up": "feed_forward.w3",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.out_proj",
    "attn_q_norm": "self_attn.q_layernorm",
    "attn_k_norm": "self_attn.k_layernorm",
    "shortconv.conv": "conv.conv",
    "shortconv.in_proj": "conv.in_proj",
    "shortconv.out_proj": "conv.out_proj",
}
EXPERT = "{expert}"  # stands for an expert's number
EXPERTS = {
    "ffn_gate_inp": "feed_forward.gate",
    "exp_probs_b": "feed_forward.expert_bias",
    "ffn_gate_exps": f"feed_forward.experts.{EXPERT}.w1",
    "ffn_down_exps": f"feed_forward.experts.{EXPERT}.w2",
    "ffn_up_exps": f"feed_forward.experts.{EXPERT}.w3",
}
WITHOUT_KIND = "expert_bias"  # transformers calls no part of it `bias`
NAMES: Mapping[str, Mapping[str, str]] = {"lfm2": WHOLE | LAYER, "lfm2moe": WHOLE | LAYER | EXPERTS}
# llama.cpp's numbers (`enum llama_pooling_type`), and sentence-transformers' names. The first one pools nothing.
POOLINGS = {0: "none", 1: "mean_tokens", 2: "cls_token", 3: "lasttoken"}
DENSE = "dense_2.weight"  # a layer behind the model, of a text's vectors
KERNEL = "shortconv.conv.weight"  # stored as (width, taps), and transformers' is (width, 1, taps)


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor is in its file.

    Attributes:
        name: its name there.
        kind: its type there, such as `Q4_0`.
        shape: as torch counts axes.
        start, size: its first byte in the file, and its bytes.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    start: int
    size: int


@dataclass(frozen=True)
class GgufFile:
    """The header of a file.

    Attributes:
        path: the file.
        metadata: its values by their keys.
        tensors: its tensors by transformers' names. One that has no such name keeps its own.
    """

    path: Path
    metadata: Mapping[str, Any] = field(repr=False)
    tensors: Mapping[str, GgufTensor] = field(repr=False)

    @classmethod
    def open(cls, path: Path) -> GgufFile:
        """Read a header, once for each state of the file.

        Raises:
            Lfm2Error: one line for a file that is cut, of another byte order or of a version that is not known; and
                where `gguf` is not installed.
        """
        state = path.stat()
        return _read(path, state.st_size, state.st_mtime_ns)

    @property
    def architecture(self) -> str:
        """What `general.architecture` says, such as `lfm2`."""
        return str(self.metadata.get("general.architecture"))

    # As `safetensors.safe_open`:

    def __enter__(self) -> GgufFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        return None

    def keys(self) -> Iterator[str]:
        """Return transformers' names."""
        return iter(self.tensors)

    def get_tensor(self, name: str) -> torch.Tensor:
        """Read and dequantise a tensor, float32."""
        tensor = self.tensors[name]
        return torch.from_numpy(self._dequantized(tensor, self._bytes(tensor))).reshape(tensor.shape)

    def get_slice(self, name: str) -> GgufSlice:
        """Return what says a tensor's shape."""
        return GgufSlice(self.tensors[name].shape)

    def get_codes(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Read the codes and scales of a matrix whose type is one of `GRIDS`.

        Returns:
            As `blocks.quantize_tensor`: uint8 (out, blocks, block_size), and float32 (out, blocks). Each value is, bit
            for bit, (code - zero point) * scale.
        """
        tensor = self.tensors[name]
        stored = self._bytes(tensor)
        parts = np.array_split(stored, -(-stored.size // BYTES_AT_ONCE))
        codes, scales = zip(*(self._coded(tensor, part) for part in parts), strict=True)
        return torch.from_numpy(np.concatenate(codes)), torch.from_numpy(np.concatenate(scales))

    def _coded(self, tensor: GgufTensor, stored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        grid = GRIDS[tensor.kind]
        shape = (len(stored), -1, grid.blocks.block_size)
        units = stored.reshape(-1, _block_bytes(tensor.kind)).copy()
        for (start, stop), byte in grid.ones.items():
            units[:, start:stop] = byte
        values = self._dequantized(tensor, stored).reshape(shape)
        scales = self._dequantized(tensor, units.reshape(stored.shape)).reshape(shape)[..., :1].copy()
        codes = np.divide(values, scales, out=np.zeros_like(values), where=scales != 0)
        codes = codes.round(out=codes) + grid.blocks.zero_point
        return codes.astype(np.uint8), scales[..., 0]

    def _bytes(self, tensor: GgufTensor) -> np.ndarray:
        """Read a tensor's bytes, uint8 (rows, bytes)."""
        rows = prod(tensor.shape[:-1])
        # Not the mapped memory, which would keep every page that was read.
        return np.fromfile(self.path, np.uint8, tensor.size, offset=tensor.start).reshape(rows, -1)

    def _dequantized(self, tensor: GgufTensor, stored: np.ndarray) -> np.ndarray:
        gguf = library()
        with np.errstate(all="ignore"):  # a value that is not finite is refused later, by its name
            values = gguf.quants.dequantize(stored, gguf.GGMLQuantizationType[tensor.kind])
        return np.ascontiguousarray(values, dtype=np.float32)


@dataclass(frozen=True)
class GgufSlice:
    """The shape of a tensor, as safetensors gives it."""

    shape: tuple[int, ...]

    def get_shape(self) -> list[int]:
        """Return it."""
        return list(self.shape)


class GgufFields:
    """What a file says of its model: the values whose keys begin with the architecture's name.

    A value that nobody takes is one that nobody knows, so the model may be another than it seems (`check_all_taken`).
    """

    def __init__(self, file: GgufFile) -> None:
        self.file = file
        start = f"{file.architecture}."
        self._left = {key.removeprefix(start): value for key, value in file.metadata.items() if key.startswith(start)}

    def take(self, key: str, kind: type, default: Any = None) -> Any:
        """Return a value.

        Args:
            key: without the architecture's name, such as `block_count`.
            kind: its type. `list` has whole numbers.
            default: what a file means that has no such value. None says that it has to have it.

        Raises:
            Lfm2Error: the value is missing, or is of another type.
        """
        named = f"{self.file.architecture}.{key}"
        if key not in self._left:
            if default is None:
                raise Lfm2Error(f"{self.file.path} does not say {named}, which its model has. {AGAIN}")
            return default
        value = self._left.pop(key)
        numbers = value if kind is list and isinstance(value, list) else [value]
        inner = int if kind is list else kind
        if not all(type(number) is inner for number in numbers) or (kind is list) != isinstance(value, list):
            raise Lfm2Error(f"{self.file.path} says that {named} is {str(value)[:60]}, which cannot be. {AGAIN}")
        return value

    def check_all_taken(self) -> None:
        """Raise `Lfm2Error` for a value that nobody took."""
        for key, value in self._left.items():
            raise Lfm2Error(
                f"{self.file.path} says that {self.file.architecture}.{key} is {str(value)[:60]}, and what that means "
                "for the model is not known here. Export the original checkpoint."
            )


def stored_bits(path: Path) -> int | None:
    """Return 4 or 8: in how many bits ONNX stores most codes of a file. None if most values are floats."""
    sizes: Counter[int | None] = Counter()
    for tensor in GgufFile.open(path).tensors.values():
        bits = None if tensor.kind in FLOATS else GRIDS[tensor.kind].blocks.bits if tensor.kind in GRIDS else 8
        sizes[bits] += prod(tensor.shape)
    return max(sizes, key=lambda bits: sizes[bits])


def library() -> Any:
    """Return the library `gguf`. Raise `Lfm2Error` where it is not installed."""
    try:
        return import_module("gguf")
    except ImportError:
        raise Lfm2Error("A GGUF file is read by the package gguf, which is not installed: pip install gguf") from None


def _block_bytes(kind: str) -> int:
    gguf = library()
    return gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1]


@lru_cache(maxsize=2)
def _read(path: Path, size: int, changed: int) -> GgufFile:
    _check_start(path)
    gguf = library()
    try:
        with path.open("rb") as opened, mmap(opened.fileno(), 0, access=ACCESS_READ) as data:
            header = _Header(data)
            metadata = {header.string(): header.value(header.number("I")) for _ in range(header.values)}
            stored = [header.tensor(gguf) for _ in range(header.tensors)]
            start = header.aligned(int(metadata.get("general.alignment", 32)))
        names = NAMES.get(str(metadata.get("general.architecture")), {})
        stored = [replace(tensor, start=start + tensor.start) for tensor in stored]
        if any(tensor.start + tensor.size > size for tensor in stored):
            raise ValueError("a tensor lies beyond its end")
        tensors = dict(pair for tensor in stored for pair in _named(tensor, names))
    except (struct.error, ValueError, KeyError, TypeError, OverflowError, MemoryError) as error:
        raise Lfm2Error(
            f"{path} cannot be read ({first_line(error) or type(error).__name__}): it is not complete, or newer than "
            f"the installed gguf. {AGAIN} Or pip install -U gguf."
        ) from None
    if metadata.get("split.count", 0) > 1:
        raise Lfm2Error(
            f"{path} is one of {metadata['split.count']} parts. Join them with llama.cpp: llama-gguf-split --merge."
        )
    return GgufFile(path, metadata, tensors)


class _Header:
    """Reads a header from its start on. `gguf.GGUFReader` does the same, and takes 20 s for 64,000 tokens (0.19)."""

    NUMBERS: ClassVar[dict[int, str]] = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
    STRING, ARRAY = 8, 9

    def __init__(self, data: mmap) -> None:
        self._data, self._at = data, 8  # after the magic and the version
        self.tensors, self.values = self.number("Q"), self.number("Q")

    def number(self, code: str) -> Any:
        return self._numbers(code, 1)[0]

    def _numbers(self, code: str, count: int) -> tuple:
        numbers = struct.unpack_from(f"<{count}{code}", self._data, self._at)
        self._at += struct.calcsize(f"<{count}{code}")
        return numbers

    def string(self) -> str:
        length = self.number("Q")
        if length > len(self._data) - self._at:
            raise ValueError("a text lies beyond its end")
        self._at += length
        return self._data[self._at - length : self._at].decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == self.STRING:
            return self.string()
        if kind != self.ARRAY:
            return self.number(self.NUMBERS[kind])
        inner, count = self.number("I"), self.number("Q")
        if inner in self.NUMBERS:
            return list(self._numbers(self.NUMBERS[inner], count))
        return [self.value(inner) for _ in range(count)]

    def tensor(self, gguf: Any) -> GgufTensor:
        """Read where a tensor is. Its start is counted from that of the first."""
        name = self.string()
        shape = tuple(reversed(self._numbers("Q", self.number("I"))))
        kind, start = gguf.GGMLQuantizationType(self.number("I")), self.number("Q")
        block, size = gguf.GGML_QUANT_SIZES[kind]
        if shape[-1] % block:
            raise ValueError(f"{name} has rows of {shape[-1]} values")
        return GgufTensor(name, kind.name, shape, start, prod(shape) // block * size)

    def aligned(self, to: int) -> int:
        """Return where tensors begin after what was read."""
        return -(-self._at // to) * to


def _check_start(path: Path) -> None:
    """Refuse a file that does not begin as a GGUF file of this byte order does."""
    with path.open("rb") as file:
        start = file.read(8)
    if start[:4] != MAGIC or len(start) < 8:
        raise Lfm2Error(f"{path} is no GGUF file: it does not begin with {MAGIC.decode()}. {AGAIN}")
    little, big = (struct.unpack(f"{order}I", start[4:])[0] for order in "<>")
    if big in VERSIONS:
        raise Lfm2Error(f"{path} is a GGUF file for big-endian machines. Take the one that llama.cpp runs here.")
    if little not in VERSIONS:
        raise Lfm2Error(f"{path} has version {little} of GGUF, and {' and '.join(map(str, VERSIONS))} are known.")


def _named(tensor: GgufTensor, names: Mapping[str, str]) -> Iterator[tuple[str, GgufTensor]]:
    """Yield a tensor with transformers' name and shape; of experts' matrices in one tensor, each for itself."""
    owner, _, kind = tensor.name.rpartition(".")
    block = re.fullmatch(r"(?:blk\.(\d+)\.)?(.+)", owner)
    if block is None or block[2] not in names:
        yield tensor.name, tensor
        return
    name = f"model.layers.{block[1]}.{names[block[2]]}" if block[1] else names[block[2]]
    if EXPERT in name:
        experts, *shape = tensor.shape
        for i in range(experts):
            start, size = tensor.start + i * (tensor.size // experts), tensor.size // experts
            one = replace(tensor, shape=tuple(shape), start=start, size=size)
            yield f"{name.replace(EXPERT, str(i))}.{kind}", one
    elif tensor.name.endswith(KERNEL):
        width, taps = tensor.shape
        yield f"{name}.{kind}", replace(tensor, shape=(width, 1, taps))
    else:
        yield name if name.endswith(WITHOUT_KIND) else f"{name}.{kind}", tensor
