"""Tuning scales while codes stay, against autograd and a naive optimizer."""

import math

import pytest
import torch
from torch import nn

from shardq.errors import QuantizationError
from shardq.optimize.scale_tuner import ScaleTuner
from shardq.quant.integer_grid import IntegerGrid
from shardq.quant.quantized import QuantizedLinear

GRID = IntegerGrid(bits=4, symmetric=True, group_size=8, full_range=True)


@pytest.fixture
def linear() -> QuantizedLinear:
    generator = torch.Generator().manual_seed(1)
    codes_OI = torch.randint(-8, 8, (6, 24), generator=generator, dtype=torch.int8)
    scale_OG = torch.randn(6, 3, generator=generator)
    return QuantizedLinear(codes_OI, scale_OG, torch.zeros(6, 3), GRID)


def gradient_by_autograd(linear: QuantizedLinear, factor_OG: torch.Tensor, gradient_OI: torch.Tensor) -> torch.Tensor:
    factor_OG = factor_OG.clone().requires_grad_(True)
    scale_OG1 = (linear.scale_OG * factor_OG.exp())[..., None]
    weight_OI = (linear.codes_OI.view(6, 3, 8).float() * scale_OG1).view(6, 24)
    (weight_OI * gradient_OI).sum().backward()
    return factor_OG.grad


def test_gradients_are_those_of_autograd(linear: QuantizedLinear):
    tuner = ScaleTuner({"linear": (6, 3)}, 0.1)
    tuner.step({"linear": torch.randn(6, 3, generator=torch.Generator().manual_seed(2))}, 0, 4)
    tuned = tuner.rescaled({"linear": linear})["linear"]
    assert not torch.equal(tuned.scale_OG, linear.scale_OG)
    weight = nn.Parameter(tuned.dequantized())
    weight.grad = torch.randn(6, 24, generator=torch.Generator().manual_seed(3))
    factor_OG = (tuned.scale_OG / linear.scale_OG).log()
    expected = gradient_by_autograd(linear, factor_OG, weight.grad)
    torch.testing.assert_close(tuner.gradients({"linear": weight})["linear"], expected, rtol=1e-5, atol=1e-5)


def test_a_linear_that_no_sample_reached_has_a_gradient_of_zeros():
    tuner = ScaleTuner({"expert": (6, 3)}, 0.1)
    assert torch.equal(tuner.gradients({"expert": nn.Parameter(torch.ones(6, 24))})["expert"], torch.zeros(6, 3))


def test_steps_are_gradients_over_their_root_mean_square(linear: QuantizedLinear):
    tuner, generator = ScaleTuner({"linear": (6, 3)}, 0.1), torch.Generator().manual_seed(4)
    factor_OG, squares_OG = torch.zeros(6, 3), torch.zeros(6, 3)
    for done in range(5):
        gradient_OG = torch.randn(6, 3, generator=generator)
        tuner.step({"linear": gradient_OG.clone()}, done, 5)
        squares_OG += gradient_OG**2
        rate = 0.1 * (1 + math.cos(math.pi * done / 5)) / 2
        factor_OG -= rate * gradient_OG / (squares_OG / (done + 1)).sqrt()
    tuned = tuner.rescaled({"linear": linear})["linear"]
    torch.testing.assert_close(tuned.scale_OG, linear.scale_OG * factor_OG.exp(), rtol=1e-5, atol=1e-6)
    assert tuned.codes_OI is linear.codes_OI


def test_a_restored_tuner_goes_on_as_the_saved_one(linear: QuantizedLinear):
    gradients = torch.randn(4, 6, 3, generator=torch.Generator().manual_seed(5))
    whole, first, second = (ScaleTuner({"linear": (6, 3)}, 0.1) for _ in range(3))
    for done in range(4):
        whole.step({"linear": gradients[done].clone()}, done, 4)
    for done in range(2):
        first.step({"linear": gradients[done].clone()}, done, 4)
    second.restore({name: value.clone() for name, value in first.state().items()})
    for done in range(2, 4):
        second.step({"linear": gradients[done].clone()}, done, 4)
    expected, found = (tuner.rescaled({"linear": linear})["linear"].scale_OG for tuner in (whole, second))
    assert torch.equal(expected, found)


def test_a_block_without_linears_has_nothing_to_tune():
    tuner = ScaleTuner({}, 0.1)
    tuner.step(tuner.gradients({}), 0, 1)
    tuner.restore(tuner.state())
    assert tuner.rescaled({}) == {}


def test_a_scale_that_is_not_finite_is_an_error(linear: QuantizedLinear):
    tuner = ScaleTuner({"linear": (6, 3)}, 1e3)
    tuner.step({"linear": -torch.ones(6, 3)}, 0, 1)
    with pytest.raises(QuantizationError, match="linear: a tuned scale is not one of its grid; lower tune.learning"):
        tuner.rescaled({"linear": linear})
