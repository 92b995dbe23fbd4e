"""Two-level scales (LPBQ): against AIMET's recorded quantizer and a naive version in float64, and to the bit."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from shardq.quant import adascale
from shardq.quant.grid import SCALE_FLOOR
from shardq.quant.integer_grid import IntegerGrid
from shardq.quant.quantized import QuantizedLinear

GOLDEN = Path(__file__).parents[1] / "golden"
RECORDED = json.loads((GOLDEN / "lpbq.json").read_text())
GRIDS = [
    IntegerGrid(bits=bits, group_size=8, decompressed_bits=wide) for bits, wide in ((4, 8), (3, 8), (2, 3), (8, 16))
]


@pytest.fixture(params=RECORDED, name="golden")
def _golden(request) -> tuple[dict[str, Tensor], IntegerGrid]:
    case = RECORDED[request.param]
    grid = IntegerGrid(bits=case["bits"], group_size=case["group"], decompressed_bits=case["decompressed"])
    return load_file(GOLDEN / f"{request.param}.safetensors"), grid


def start_scale(weight: Tensor, grid: IntegerGrid) -> Tensor:
    """Scale [R, 1] of the min-max grid."""
    ends = grid.start_range(grid.rows(weight))
    return grid.scale_of(*ends, weight.shape[1] // grid.group_size)


def test_grid_is_aimets(golden):
    tensors, grid = golden
    scale_OG = start_scale(tensors["weight"], grid).view_as(tensors["scale"])
    torch.testing.assert_close(scale_OG, tensors["scale"], rtol=1e-6, atol=0)
    multiplier_OG, channel_O1 = grid.two_levels(scale_OG)
    assert torch.equal(multiplier_OG, tensors["multiplier"])
    torch.testing.assert_close(channel_O1, tensors["channel_scale"], rtol=1e-6, atol=0)


def test_round_to_nearest_is_aimets(golden):
    tensors, grid = golden
    rows, scale = grid.rows(tensors["weight"]), start_scale(tensors["weight"], grid)
    codes = grid.encode(rows, scale, torch.zeros_like(scale))
    rounded = grid.decode(codes, scale, torch.zeros_like(scale)).view_as(tensors["output"])
    torch.testing.assert_close(rounded, tensors["output"], rtol=1e-6, atol=0)


def test_aimets_own_scales_are_taken_apart_to_the_bit(golden):
    tensors, grid = golden
    multiplier_OG, channel_O1 = grid.two_levels(tensors["scale"])
    assert torch.equal(multiplier_OG, tensors["multiplier"]) and torch.equal(channel_O1, tensors["channel_scale"])


def spread_weight(grid: IntegerGrid) -> Tensor:
    """A weight [60, 48] whose groups differ in size by more than the multipliers reach; a zero channel and group."""
    generator = torch.Generator().manual_seed(grid.bits)
    sizes = torch.rand(60, 6, generator=generator).mul(9).sub(9).exp().repeat_interleave(8, dim=1)
    weight = torch.randn(60, 48, generator=generator) * sizes
    weight[3], weight[4, 8:16] = 0, 0
    return weight


def naive_scale(weight: Tensor, grid: IntegerGrid) -> np.ndarray:
    """Scales [O, G] of the min-max grid on two levels, one channel after the other in float64."""
    scales = []
    for row in weight.double().numpy().reshape(len(weight), -1, grid.group_size):
        top = 2 if grid.bits == 2 else grid.qmax
        plain = [max(group.max() / top, group.min() / grid.qmin, SCALE_FLOOR) for group in row]
        channel = max(plain) / 2 ** (grid.decompressed_bits - grid.bits)
        most = 2 ** (grid.decompressed_bits - grid.bits)
        scales.append([min(max(round(scale / channel), 1), most) * channel for scale in plain])
    return np.array(scales)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_scales_are_those_of_a_naive_version(grid: IntegerGrid):
    weight = spread_weight(grid)
    expected = torch.from_numpy(naive_scale(weight, grid)).float()
    found = start_scale(weight, grid).view_as(expected)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    multiplier_OG, _ = grid.two_levels(found)
    assert multiplier_OG.amin() == 1 or grid.decompressed_bits == 16, "some group was meant to be below the reach"
    assert (multiplier_OG.amax(1) == grid.max_multiplier).all()


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_products_are_taken_apart_to_the_bit(grid: IntegerGrid):
    generator = torch.Generator().manual_seed(1)
    multiplier_OG = torch.randint(1, grid.max_multiplier + 1, (20000, 5), generator=generator).float()
    multiplier_OG[:, 2] = grid.max_multiplier
    channel_O1 = torch.rand(20000, 1, generator=generator).mul(12).sub(12).exp()
    found = grid.two_levels(multiplier_OG * channel_O1)
    assert torch.equal(found[0], multiplier_OG) and torch.equal(found[1], channel_O1)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_decompressed_codes_lie_on_the_channels_grid_of_so_many_bits(grid: IntegerGrid):
    """What a runtime does: multiply codes and multipliers as integers, and the sum by the channel's scale."""
    weight = spread_weight(grid)
    scale = start_scale(weight, grid)
    codes = grid.encode(grid.rows(weight), scale, torch.zeros_like(scale))
    scale_OG = scale.view(60, 6)
    linear = QuantizedLinear(codes.view(60, 48), scale_OG, torch.zeros_like(scale_OG), grid)
    assert linear.has_valid_scales
    multiplier_OG, channel_O1 = grid.two_levels(scale_OG)
    wide_OI = linear.codes_OI.int() * multiplier_OG.int().repeat_interleave(8, dim=1)
    half = 1 << (grid.decompressed_bits - 1)
    assert -half <= wide_OI.amin() and wide_OI.amax() < half
    torch.testing.assert_close(wide_OI * channel_O1, linear.dequantized(), rtol=1e-6, atol=0)


def test_scale_one_bit_off_is_not_valid():
    grid = GRIDS[0]
    scale_OG = start_scale(spread_weight(grid), grid).view(60, 6)
    codes = torch.zeros(60, 48, dtype=torch.int8)
    assert QuantizedLinear(codes, scale_OG, torch.zeros_like(scale_OG), grid).has_valid_scales
    column = (scale_OG[7] < scale_OG[7].amax()).nonzero()[0]
    for towards in (0.0, 1.0):
        off_OG = scale_OG.clone()
        off_OG[7, column] = torch.nextafter(off_OG[7, column], torch.tensor(towards))
        assert not QuantizedLinear(codes, off_OG, torch.zeros_like(scale_OG), grid).has_valid_scales


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_learned_ends_give_whole_multiples_and_get_their_gradient_straight_through(grid: IntegerGrid):
    weight = spread_weight(grid)
    plain = IntegerGrid(bits=grid.bits, group_size=8)
    ends = grid.start_range(grid.rows(weight))
    beta, gamma = (torch.empty(360, 1).uniform_(-0.4, 0.4).requires_grad_() for _ in range(2))
    trained = adascale.Trained(None, None, beta, gamma)
    scale, zero_point = (value.detach() for value in adascale.learned_grid(ends, trained, grid, 6))
    multiplier_OG, channel_O1 = grid.two_levels(scale.view(60, 6))
    assert torch.equal((multiplier_OG * channel_O1).view(-1, 1), scale) and not zero_point.any()
    expected, _ = adascale.learned_grid(ends, trained, plain)
    inside = multiplier_OG.view(-1, 1) > 1
    nearest = (scale - expected).abs() <= channel_O1.expand(60, 6).reshape(-1, 1) * 0.5001
    assert inside.any() and nearest[inside].all()
    weights = torch.randn_like(scale)
    found = adascale.learned_grid_gradients(weights, torch.zeros_like(scale), scale, ends, trained, grid)
    for value, of_plain in zip(found, torch.autograd.grad((expected * weights).sum(), (beta, gamma)), strict=True):
        torch.testing.assert_close(value, of_plain, rtol=1e-6, atol=0)


def test_without_the_number_of_groups_there_is_no_scale():
    with pytest.raises(TypeError):
        GRIDS[0].scale_of(-torch.ones(4, 1), torch.ones(4, 1))
