"""Grids of activations against loops in numpy, AIMET's quantizer and compressed-tensors' own rounding."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from safetensors.torch import load_file

from shardq.quant.activation import ActivationGrid, ActivationLevels, grid_between, rounded, token_grid

GOLDEN = Path(__file__).parents[1] / "golden"
ENCODINGS = json.loads((GOLDEN / "activations.json").read_text())["encodings"]
VALUES = load_file(GOLDEN / "activations.safetensors")["outlier"]


def golden_grid(case: str) -> ActivationGrid:
    bits, kind = case.split()
    return grid_between(VALUES.min(), VALUES.max(), ActivationLevels(bits=int(bits), symmetric=kind == "symmetric"))


@pytest.mark.parametrize("case", ENCODINGS)
def test_static_rounding_is_aimets(case: str):
    found, recorded = rounded(VALUES, golden_grid(case)), ENCODINGS[case]
    assert found.flatten()[:8].tolist() == pytest.approx(recorded["first"], rel=1e-6)
    assert found.double().sum().item() == pytest.approx(recorded["rounded_sum"], rel=1e-6)


@pytest.mark.parametrize("grid", [ActivationGrid(4, True, 0.5, 0), ActivationGrid(5, False, 0.25, -7)])
def test_static_rounding_takes_each_value_to_its_nearest_grid_point(grid: ActivationGrid):
    values = torch.linspace(-9, 9, 371)
    points = (np.arange(-(2 ** (grid.bits - 1)), 2 ** (grid.bits - 1)) - grid.zero_point) * grid.scale
    distance = np.abs(values.numpy()[:, None] - points).min(1)
    found = rounded(values, grid)
    assert np.isin(found.numpy(), points).all()
    np.testing.assert_allclose((found - values).abs().numpy(), distance, atol=1e-6)
    assert torch.equal(rounded(found, grid), found)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_by_token_is_compressed_tensors(bits: int, symmetric: bool):
    values = torch.randn(2, 7, 24) * torch.logspace(-3, 3, 7)[:, None]
    values[0, 2] = 0
    args = QuantizationArgs(num_bits=bits, symmetric=symmetric, strategy="token", dynamic=True)
    scale, zero_point = compute_dynamic_scales_and_zp(values, args, torch.nn.Linear(1, 1))
    found = rounded(values, ActivationGrid(bits, symmetric))
    torch.testing.assert_close(found, fake_quantize(values, scale, zero_point, args), rtol=0, atol=0)


@pytest.mark.parametrize("grid", [ActivationGrid(8, True), ActivationGrid(8, False, 0.0371, 5)])
def test_half_precision_values_find_the_points_that_float32_finds(grid: ActivationGrid):
    values = torch.randn(2, 7, 24).bfloat16()
    found = rounded(values, grid)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, rounded(values.float(), grid).bfloat16())


def test_each_token_has_a_grid_of_its_own():
    values = torch.randn(2, 5, 16) * torch.logspace(0, 4, 5)[:, None]
    scale, zero_point = token_grid(values, ActivationLevels(bits=8))
    assert scale.shape == zero_point.shape == (2, 5, 1)
    error = (rounded(values, ActivationGrid(8, True)) - values).abs()
    assert (error <= scale * 0.5001).all()
    assert (error.amax(-1) > scale[..., 0] * 0.2).all()  # of no finer grid


@pytest.mark.parametrize(
    "grid, is_valid",
    [
        (ActivationGrid(8, True), True),
        (ActivationGrid(8, True, 0.5, 0), True),
        (ActivationGrid(8, False, 0.5, -128), True),
        (ActivationGrid(8, True, 0.5, 1), False),
        (ActivationGrid(8, False, 0.5, 128), False),
        (ActivationGrid(8, True, 0.0, 0), False),
        (ActivationGrid(8, True, float("nan"), 0), False),
        (ActivationGrid(8, True, float("inf"), 0), False),
        (ActivationGrid(8, True, None, 0), False),
    ],
)
def test_what_is_a_grid(grid: ActivationGrid, is_valid: bool):
    assert grid.is_valid is is_valid


def test_constant_activations_have_a_grid():
    for value in (0.0, 3.0, -2.0):
        grid = grid_between(torch.tensor(value), torch.tensor(value), ActivationLevels(bits=8))
        assert grid.is_valid
        assert rounded(torch.full((3,), value), grid) == pytest.approx(torch.full((3,), value), rel=1e-2)
