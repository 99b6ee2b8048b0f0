"""The codes of GGUF's types go over bit for bit, and a file that is not whole is refused by one line."""

from __future__ import annotations

import struct
import sys

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from gguf_files import stored_as

from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.weights.blocks import dequantize_tensor
from optimum_lfm2.weights.gguf import GRIDS, GgufFile, stored_bits


ROWS, WIDTH = 5, 512


def weight(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, (ROWS, WIDTH)).astype(np.float32)


def write(path, kinds, **metadata):
    """Write a file with a tensor of each kind, named by it. Return what the library reads of each."""
    writer = gguf.GGUFWriter(path, "lfm2")
    for key, value in metadata.items():
        writer.add_uint32(key, value)
    values = {}
    for seed, kind in enumerate(kinds):
        blocks = stored_as(kind, weight(seed), seed)
        raw = None if kind in ("F32", "F16") else GGMLQuantizationType[kind]
        writer.add_tensor(kind, blocks, raw_dtype=raw)
        values[kind] = quants.dequantize(blocks, GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


def test_every_grid_is_exact(tmp_path):
    path = tmp_path / "x.gguf"
    values = write(path, GRIDS)
    file = GgufFile.open(path)
    for kind, grid in GRIDS.items():
        codes, scales = file.get_codes(kind)
        assert codes.shape == (ROWS, WIDTH // grid.blocks.block_size, grid.blocks.block_size)
        assert int(codes.max()) < 1 << grid.blocks.bits
        assert len(codes.unique()) > 7, "codes that do not vary prove nothing"
        assert scales.dtype == torch.float32
        assert np.array_equal(dequantize_tensor(codes, scales, WIDTH, grid.blocks).numpy(), values[kind]), kind
        assert np.array_equal(file.get_tensor(kind).numpy(), values[kind])


def test_a_block_of_zeros_keeps_its_zeros(tmp_path):
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "lfm2")
    writer.add_tensor("w", quants.quantize(np.zeros((2, 64), np.float32), GGMLQuantizationType.Q4_0), raw_dtype=2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    codes, scales = GgufFile.open(path).get_codes("w")
    assert dequantize_tensor(codes, scales, 64, GRIDS["Q4_0"].blocks).abs().max() == 0


def test_other_types_and_floats_are_read_as_the_library_reads_them(tmp_path):
    path = tmp_path / "x.gguf"
    values = write(path, ("Q4_1", "Q4_K", "Q5_K", "Q2_K", "F16", "BF16", "F32"))
    file = GgufFile.open(path)
    for kind, value in values.items():
        assert np.array_equal(file.get_tensor(kind).numpy(), value.astype(np.float32)), kind


@pytest.mark.parametrize(("kinds", "bits"), [(("Q4_0", "F32", "Q4_0"), 4), (("Q8_0",), 8), (("F16",), None)])
def test_the_bits_of_most_codes(tmp_path, kinds, bits):
    path = tmp_path / "x.gguf"
    write(path, dict.fromkeys(kinds))
    assert stored_bits(path) == bits


def test_a_file_that_changes_is_read_again(tmp_path):
    path = tmp_path / "x.gguf"
    write(path, ["Q4_0"])
    assert list(GgufFile.open(path).keys()) == ["Q4_0"]
    write(path, ["Q8_0", "F32"])
    assert list(GgufFile.open(path).keys()) == ["Q8_0", "F32"]


def refusal(path) -> str:
    with pytest.raises(Lfm2Error) as error:
        GgufFile.open(path)
    said = str(error.value)
    assert "\n" not in said
    assert str(path) in said
    return said


def test_a_cut_file_is_refused_wherever_it_is_cut(tmp_path):
    path, cut = tmp_path / "x.gguf", tmp_path / "cut.gguf"
    write(path, ("Q4_0", "F32"), **{"lfm2.block_count": 3})
    whole = path.read_bytes()
    for length in (9, 20, 40, 70, 100, len(whole) // 3, len(whole) - 33, len(whole) - 1):
        cut.write_bytes(whole[:length])
        assert "cannot be read" in refusal(cut)
    for length in (0, 3, 7):
        cut.write_bytes(whole[:length])
        assert "no GGUF file" in refusal(cut)


def test_a_foreign_a_big_endian_and_a_newer_file_are_refused(tmp_path):
    path, other = tmp_path / "x.gguf", tmp_path / "other.gguf"
    write(path, ["Q4_0"])
    whole = path.read_bytes()
    other.write_bytes(b"PK\3\4" + whole)
    assert "no GGUF file" in refusal(other)
    other.write_bytes(whole[:4] + struct.pack(">I", 3) + whole[8:])
    assert "big-endian" in refusal(other)
    other.write_bytes(whole[:4] + struct.pack("<I", 9) + whole[8:])
    assert "version 9" in refusal(other)
    at = whole.rindex(struct.pack("<I", GGMLQuantizationType.Q4_0))  # the tensor's type
    other.write_bytes(whole[:at] + struct.pack("<I", 999) + whole[at + 4 :])
    assert "pip install -U gguf" in refusal(other)


def test_a_part_of_a_file_is_refused(tmp_path):
    path = tmp_path / "x-00001-of-00002.gguf"
    write(path, ["Q4_0"], **{"split.count": 2})
    assert "llama-gguf-split --merge" in refusal(path)


def test_without_the_library_one_line_says_how_to_get_it(tmp_path, monkeypatch):
    path = tmp_path / "x.gguf"
    write(path, ["Q4_0"])
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(Lfm2Error, match="pip install gguf"):
        GgufFile.open(path)
