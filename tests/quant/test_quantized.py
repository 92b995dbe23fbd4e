"""The result of quantizing a linear, on grids that describe the same weight."""

import math

import pytest
import torch

from shardq.quant.integer_grid import IntegerGrid
from shardq.quant.quantized import QuantizedLinear


@pytest.mark.parametrize("group_size", [None, 8])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_positive_scales_describe_the_same_weight(bits: int, group_size: int | None):
    grid = IntegerGrid(bits=bits, group_size=group_size, full_range=True)
    scale = torch.randn(6, 32 // (group_size or 32))
    codes = torch.randint(grid.qmin, grid.qmax + 1, (6, 32), dtype=torch.int8)
    linear = QuantizedLinear(codes, scale, torch.zeros_like(scale), grid)
    positive = linear.with_positive_scales()
    assert (scale < 0).any() and (positive.scale_OG > 0).all()
    assert torch.equal(positive.dequantized(), linear.dequantized())
    assert positive.codes_OI.dtype == torch.int8
    assert positive.grid == IntegerGrid(bits=bits, group_size=group_size, symmetric=False)
    assert positive.codes_OI.min() >= grid.qmin and positive.codes_OI.max() <= grid.qmax
    assert set(positive.zero_point_OG.flatten().tolist()) <= {0, -1}


@pytest.mark.parametrize("symmetric", [True, False])
def test_grids_with_positive_scales_are_left_as_they_are(symmetric: bool):
    linear = QuantizedLinear(torch.zeros(2, 4, dtype=torch.int8), torch.ones(2, 1), torch.zeros(2, 1),
                             IntegerGrid(bits=4, symmetric=symmetric))  # fmt: skip
    assert linear.with_positive_scales() is linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weight_in_pieces_is_the_whole_one_rounded_once(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("shardq.quant.grid.CHUNK", 24)  # three groups: the last piece is shorter
    grid = IntegerGrid(bits=4, symmetric=False, group_size=8)
    codes, scale = torch.randint(-8, 8, (5, 32), dtype=torch.int8), torch.rand(5, 4)
    zero_point = torch.randint(-8, 8, (5, 4)).float()
    whole = ((codes.view(5, 4, 8).float() - zero_point[..., None]) * scale[..., None]).view(5, 32)
    assert torch.equal(QuantizedLinear(codes, scale, zero_point, grid).dequantized(dtype), whole.to(dtype))


def rescaled_by_one_percent(grid: IntegerGrid) -> tuple[QuantizedLinear, QuantizedLinear]:
    generator = torch.Generator().manual_seed(6)
    codes_OI = torch.randint(-8, 8, (4, 32), generator=generator, dtype=torch.int8)
    start_R1 = torch.rand(16, 1, generator=generator) + 0.1
    scale_OG = grid.kept_scale(start_R1, 4).view(4, 4)
    linear = QuantizedLinear(codes_OI, scale_OG, torch.zeros(4, 4), grid)
    assert linear.has_valid_scales
    return linear, linear.rescaled(torch.full((4, 4), 0.01))


def test_rescaled_scales_are_whole_multiples_on_a_two_level_grid():
    linear, tuned = rescaled_by_one_percent(IntegerGrid(bits=4, symmetric=True, group_size=8, decompressed_bits=8))
    assert tuned.has_valid_scales
    # All by one factor: the multipliers stay, and the channels' scales take it.
    torch.testing.assert_close(tuned.scale_OG, linear.scale_OG * math.exp(0.01), rtol=1e-6, atol=0)


def test_rescaled_scales_are_values_of_the_dtype_that_keeps_them():
    linear, tuned = rescaled_by_one_percent(IntegerGrid(bits=4, symmetric=True, group_size=8, scale_dtype="bfloat16"))
    expected = (linear.scale_OG * math.exp(0.01)).bfloat16().float()
    assert torch.equal(tuned.scale_OG, expected)
    assert not torch.equal(tuned.scale_OG, linear.scale_OG)
