"""The trainable linear: where it starts, what it trains, what it becomes."""

import math

import pytest
import torch
from torch import Tensor, nn

from shardq.optimize.linear import AdaScaleLinear, Method
from shardq.quant.spec import QuantSpec

METHODS = ("adascale", "flexround", "lwc", "rtn")
TRAINED = {
    "adascale": {"beta", "gamma", "s2", "s3"},
    "flexround": {"step", "s2", "s3"},
    "lwc": {"beta", "gamma"},
    "rtn": set(),
}
SPECS = [
    QuantSpec(bits=bits, symmetric=symmetric, group_size=group_size)
    for bits in (2, 3, 4, 8)
    for symmetric in (True, False)
    for group_size in (None, 8)
]


def make_linear(bias: bool = True) -> nn.Linear:
    """A linear of 24 inputs and 10 outputs whose channels differ in size and offset."""
    linear = nn.Linear(24, 10, bias=bias)
    with torch.no_grad():
        linear.weight.mul_(torch.linspace(0.1, 3, 10)[:, None]).add_(torch.linspace(-0.2, 0.2, 10)[:, None])
    return linear.requires_grad_(False)


def round_to_nearest(weight_OI: Tensor, spec: QuantSpec) -> Tensor:
    """The reference: one value at a time, in Python's own numbers."""
    size = spec.group_size or weight_OI.shape[1]
    rows = weight_OI.reshape(-1, size).tolist()
    return torch.tensor([row_to_nearest(row, spec.bits, spec.symmetric) for row in rows]).reshape(weight_OI.shape)


def row_to_nearest(row: list[float], bits: int, symmetric: bool) -> list[float]:
    """Round the values that share one scale."""
    low_code, high_code = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    low, high = min(0.0, *row), max(0.0, *row)
    if symmetric:
        # At 2 bits the largest code would waste half of the range: the positive end may be cut by one step.
        scale = max(high / (2 if bits == 2 else high_code), low / low_code)
        zero_point = 0
    else:
        scale = (high - low) / (2**bits - 1)
        zero_point = min(max(round(low_code - low / scale), low_code), high_code)
    codes = [min(max(round(value / scale) + zero_point, low_code), high_code) for value in row]
    return [(code - zero_point) * scale for code in codes]


def set_randomly(module: nn.Module, size: float) -> None:
    """Move all trained parameters away from their start."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.uniform_(-size, size)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_start_is_round_to_nearest(spec: QuantSpec, method: Method):
    linear = make_linear()
    inputs = torch.randn(2, 5, 24)
    expected = inputs @ round_to_nearest(linear.weight, spec).T + linear.bias
    torch.testing.assert_close(AdaScaleLinear(linear, spec, method)(inputs), expected, rtol=1e-5, atol=1e-5)


def test_linear_without_bias_has_none():
    linear = make_linear(bias=False)
    inputs = torch.randn(3, 24)
    expected = inputs @ round_to_nearest(linear.weight, QuantSpec(bits=4)).T
    torch.testing.assert_close(AdaScaleLinear(linear, QuantSpec(bits=4), "adascale")(inputs), expected)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_method_trains_exactly_its_parameters(method: Method, symmetric: bool):
    module = AdaScaleLinear(make_linear(), QuantSpec(bits=3, symmetric=symmetric), method)
    assert {name for name, _ in module.named_parameters()} == TRAINED[method]
    if method != "rtn":
        module(torch.randn(7, 24)).square().sum().backward()
    moved = {name for name, parameter in module.named_parameters() if parameter.grad.abs().sum() > 0}
    assert moved == TRAINED[method], "a parameter gets no gradient"


@pytest.mark.parametrize("method", METHODS)
def test_parameters_start_at_zero_in_float32(method: Method):
    for parameter in AdaScaleLinear(make_linear(), QuantSpec(bits=4), method).parameters():
        assert parameter.dtype == torch.float32 and not parameter.any()


def test_weight_is_frozen_and_counted_once():
    linear = make_linear()
    module = AdaScaleLinear(linear, QuantSpec(bits=4), "adascale")
    sizes = {name: tensor.numel() for name, tensor in module.state_dict().items()}
    assert sizes.pop("rows") == linear.weight.numel()
    assert sizes.pop("s2") == linear.weight.numel()
    assert set(sizes.values()) == {linear.out_features}
    assert module.rows.data_ptr() == linear.weight.data_ptr(), "the weight was copied"


@pytest.mark.parametrize("group_size", [None, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_folded_weight_is_the_one_that_was_trained(method: Method, symmetric: bool, group_size: int | None):
    spec = QuantSpec(bits=3, symmetric=symmetric, group_size=group_size)
    module = AdaScaleLinear(make_linear(bias=False), spec, method)
    set_randomly(module, 0.3)
    with torch.no_grad():
        trained_OI = module(torch.eye(24)).T
    assert torch.equal(module.folded().dequantized(), trained_OI)


@pytest.mark.parametrize("symmetric", [True, False])
def test_folded_codes_are_whole_and_inside_the_grid(symmetric: bool):
    spec = QuantSpec(bits=3, symmetric=symmetric, group_size=8)
    module = AdaScaleLinear(make_linear(), spec, "adascale")
    set_randomly(module, 1.0)
    folded = module.folded()
    assert folded.codes_OI.dtype == torch.int8 and folded.codes_OI.shape == (10, 24)
    assert -4 <= folded.codes_OI.min() and folded.codes_OI.max() <= 3
    assert folded.scale_OG.shape == folded.zero_point_OG.shape == (10, 3)
    assert torch.equal(folded.zero_point_OG, folded.zero_point_OG.round())
    assert symmetric == (not folded.zero_point_OG.any())


def test_clipping_and_division_act_as_their_logarithms_say():
    spec = QuantSpec(bits=8)
    linear = make_linear(bias=False)
    start = AdaScaleLinear(linear, spec, "rtn").folded().scale_OG
    module = AdaScaleLinear(linear, spec, "adascale")
    with torch.no_grad():
        module.beta.fill_(math.log(2))
        module.gamma.fill_(math.log(2))
        module.s2.fill_(math.log(4))
        module.s3.fill_(math.log(0.5))
    torch.testing.assert_close(module.folded().scale_OG, 2 * start)
    # The weight is halved: divided by 4 and by 1/2, and on 8 bits little is lost to rounding.
    error = (module.folded().dequantized() - linear.weight / 2).abs()
    assert (error <= start * 1.001).all()
