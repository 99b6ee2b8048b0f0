"""The arithmetic of 4 and 8 bits."""

from __future__ import annotations

import pytest
import torch
from rounding import to_nearest

from optimum_lfm2.weights.blocks import Blocks, dequantize_tensor, pack, quantize_tensor


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block_size", [32, 128])
def test_better_than_rounding_to_nearest(bits, block_size):
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    blocks = Blocks(bits, block_size)
    back = dequantize_tensor(*quantize_tensor(weight, blocks), 256, blocks)
    error, bound = ((x - weight).pow(2).mean() for x in (back, to_nearest(weight, bits, block_size)))
    assert error < bound
    assert error < weight.pow(2).mean() / (50 if bits == 4 else 10_000)


def test_a_width_that_is_no_multiple_and_a_row_of_zeros():
    weight = torch.randn(7, 80, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    blocks = Blocks(8, 32)
    codes, scales = quantize_tensor(weight, blocks)
    assert codes.shape == (7, 3, 32)
    back = dequantize_tensor(codes, scales, 80, blocks)
    assert not back[3].any()
    torch.testing.assert_close(back, weight, atol=0.03, rtol=0)


def test_two_codes_a_byte():
    codes = torch.tensor([[[1, 2, 15, 0]]], dtype=torch.uint8)
    assert pack(codes, Blocks(4, 4)).tolist() == [[[0x21, 0x0F]]]
    assert pack(codes, Blocks(8, 4)) is codes
