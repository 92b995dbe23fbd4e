"""The quantizer of a linear: where it starts, what it trains, what it becomes, and what it leaves behind."""

import math
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from shardq.errors import QuantizationError
from shardq.optimize.linear_quantizer import LinearQuantizer, Method
from shardq.quant.adascale import Kernels
from shardq.quant.integer_grid import IntegerGrid

METHODS = ("adascale", "flexround", "lwc", "rtn")
TRAINED = {
    "adascale": {"beta", "gamma", "s2", "s3"},
    "flexround": {"step", "s2", "s3"},
    "lwc": {"beta", "gamma"},
    "rtn": set(),
}
GRIDS = [
    IntegerGrid(bits=bits, symmetric=symmetric, group_size=group_size)
    for bits in (2, 3, 4, 8)
    for symmetric in (True, False)
    for group_size in (None, 8)
]


def make_weight() -> Tensor:
    """A weight of 10 outputs and 24 inputs whose channels differ in size and offset."""
    return torch.randn(10, 24) * torch.linspace(0.02, 0.6, 10)[:, None] + torch.linspace(-0.2, 0.2, 10)[:, None]


def started(weight_OI: Tensor, grid: IntegerGrid, method: Method) -> LinearQuantizer:
    """A quantizer at the start for a weight."""
    quantizer = LinearQuantizer(weight_OI, grid, method)
    quantizer.start(weight_OI)
    return quantizer


def fake_quantized(quantizer: LinearQuantizer, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight of a quantizer as it is trained."""
    return quantizer(dtype, Kernels())


def round_to_nearest(weight_OI: Tensor, grid: IntegerGrid) -> Tensor:
    """The reference: one value at a time, in Python's own numbers."""
    size = grid.group_size or weight_OI.shape[1]
    rows = weight_OI.reshape(-1, size).tolist()
    return torch.tensor([row_to_nearest(row, grid.bits, grid.symmetric) for row in rows]).reshape(weight_OI.shape)


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
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_start_is_round_to_nearest(grid: IntegerGrid, method: Method):
    weight_OI = make_weight()
    actual_OI = fake_quantized(started(weight_OI, grid, method))
    torch.testing.assert_close(actual_OI, round_to_nearest(weight_OI, grid), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("grid", [IntegerGrid(bits=4), IntegerGrid(bits=3, symmetric=False, group_size=8)], ids=str)
def test_16_bit_weight_starts_on_the_float32_grid_of_its_values(grid: IntegerGrid):
    weight_OI = make_weight().bfloat16()
    actual_OI = fake_quantized(started(weight_OI, grid, "adascale"))
    torch.testing.assert_close(actual_OI, round_to_nearest(weight_OI, grid), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_method_trains_exactly_its_parameters(method: Method, symmetric: bool):
    quantizer = started(make_weight(), IntegerGrid(bits=3, symmetric=symmetric), method)
    assert {name for name, _ in quantizer.named_parameters()} == TRAINED[method]
    if method != "rtn":
        (torch.randn(7, 24) @ fake_quantized(quantizer).T).square().sum().backward()
    moved = {name for name, parameter in quantizer.named_parameters() if parameter.grad.abs().sum() > 0}
    assert moved == TRAINED[method], "a parameter gets no gradient"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_parameters_and_their_gradients_are_float32(method: Method, dtype: torch.dtype):
    quantizer = started(make_weight().to(dtype), IntegerGrid(bits=4), method)
    if method != "rtn":
        fake_quantized(quantizer, dtype).square().sum().backward()
    for parameter in quantizer.parameters():
        assert parameter.dtype == parameter.grad.dtype == torch.float32 and not parameter.any()


@pytest.mark.parametrize("method", METHODS)
def test_weight_in_16_bits_is_the_float32_one_rounded(method: Method):
    quantizer = started(make_weight(), IntegerGrid(bits=4, symmetric=False), method)
    set_randomly(quantizer, 0.3)
    actual_OI = fake_quantized(quantizer, torch.bfloat16)
    assert actual_OI.dtype == torch.bfloat16 and torch.equal(actual_OI, fake_quantized(quantizer).bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weight_is_held_as_it_is_stored_and_not_copied(dtype: torch.dtype):
    weight_OI = make_weight().to(dtype)
    quantizer = started(weight_OI, IntegerGrid(bits=4, group_size=8), "adascale")
    assert quantizer.rows.dtype == dtype and quantizer.rows.data_ptr() == weight_OI.data_ptr()
    sizes = {name: tensor.numel() for name, tensor in quantizer.state_dict().items()}
    assert sizes.pop("s2") == weight_OI.numel()
    assert set(sizes.values()) == {10 * 3}, "beside s2 there are only values of a group"


def test_weight_is_let_go_of():
    values = make_weight().numpy().copy()
    alive = weakref.ref(values)
    quantizer = started(torch.from_numpy(values), IntegerGrid(bits=4), "adascale")
    del values
    assert np.isfinite(alive()).all(), "the quantizer needs it until it is released"
    quantizer.release()
    assert alive() is None


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_starting_again_leaves_nothing_of_the_weight_before(method: Method, symmetric: bool):
    grid = IntegerGrid(bits=3, symmetric=symmetric, group_size=8)
    first_OI, second_OI = make_weight(), make_weight()
    quantizer = started(first_OI, grid, method)
    storage = {name: tensor.data_ptr() for name, tensor in quantizer.state_dict().items()}
    set_randomly(quantizer, 0.3)
    if method != "rtn":
        fake_quantized(quantizer).sum().backward()
    quantizer.start(second_OI)
    assert all(parameter.grad is None for parameter in quantizer.parameters())
    torch.testing.assert_close(fake_quantized(quantizer), round_to_nearest(second_OI, grid), rtol=1e-5, atol=1e-6)
    assert {name: tensor.data_ptr() for name, tensor in quantizer.state_dict().items()} == storage


@pytest.mark.parametrize("group_size", [None, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_folded_weight_is_the_one_that_was_trained(method: Method, symmetric: bool, group_size: int | None):
    grid = IntegerGrid(bits=3, symmetric=symmetric, group_size=group_size)
    quantizer = started(make_weight(), grid, method)
    set_randomly(quantizer, 0.3)
    assert torch.equal(quantizer.folded().dequantized(), fake_quantized(quantizer))


@pytest.mark.parametrize("method", METHODS)
def test_scales_on_two_levels_are_whole_multiples_from_start_to_fold(method: Method):
    plain, grid = (IntegerGrid(bits=4, group_size=8, decompressed_bits=wide) for wide in (None, 8))
    weight_OI, importance_I = make_weight(), torch.rand(24)
    quantizers = [LinearQuantizer(weight_OI, one, method) for one in (plain, grid)]
    for quantizer in quantizers:
        quantizer.start(weight_OI, importance_I)
    searched, found = (quantizer.folded() for quantizer in quantizers)
    channel_O1 = searched.scale_OG.amax(1, keepdim=True) / 16
    multiplier_OG = (searched.scale_OG / channel_O1).round()
    assert found.has_valid_scales and not replace(searched, grid=grid).has_valid_scales
    assert torch.equal(found.scale_OG, multiplier_OG * channel_O1)
    set_randomly(quantizers[1], 0.3)
    trained = quantizers[1].folded()
    assert trained.has_valid_scales
    assert torch.equal(trained.dequantized(), fake_quantized(quantizers[1]))


@pytest.mark.parametrize("symmetric", [True, False])
def test_folded_codes_are_whole_and_inside_the_grid(symmetric: bool):
    quantizer = started(make_weight(), IntegerGrid(bits=3, symmetric=symmetric, group_size=8), "adascale")
    set_randomly(quantizer, 1.0)
    folded = quantizer.folded()
    assert folded.codes_OI.dtype == torch.int8 and folded.codes_OI.shape == (10, 24)
    assert -4 <= folded.codes_OI.min() and folded.codes_OI.max() <= 3
    assert folded.scale_OG.shape == folded.zero_point_OG.shape == (10, 3)
    assert torch.equal(folded.zero_point_OG, folded.zero_point_OG.round())
    assert symmetric == (not folded.zero_point_OG.any())


def test_clipping_and_division_act_as_their_logarithms_say():
    grid = IntegerGrid(bits=8)
    weight_OI = make_weight()
    start = started(weight_OI, grid, "rtn").folded().scale_OG
    quantizer = started(weight_OI, grid, "adascale")
    with torch.no_grad():
        quantizer.beta.fill_(math.log(2))
        quantizer.gamma.fill_(math.log(2))
        quantizer.s2.fill_(math.log(4))
        quantizer.s3.fill_(math.log(0.5))
    torch.testing.assert_close(quantizer.folded().scale_OG, 2 * start)
    # The weight is halved: divided by 4 and by 1/2, and on 8 bits little is lost to rounding.
    error = (quantizer.folded().dequantized() - weight_OI / 2).abs()
    assert (error <= start * 1.001).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_are_made_for_the_scales_that_are_kept(method: Method, symmetric: bool):
    quantizer = started(make_weight(), IntegerGrid(bits=8, symmetric=symmetric, scale_dtype="bfloat16"), method)
    with torch.no_grad():
        for parameter in quantizer.parameters():
            parameter.uniform_(-0.05, 0.05)
        trained = fake_quantized(quantizer)
    folded = quantizer.folded()
    assert torch.equal(folded.scale_OG, folded.scale_OG.bfloat16().float())
    assert torch.equal(folded.dequantized(), trained)
    if method == "rtn":
        distance = (folded.dequantized() - quantizer.rows).abs() / folded.scale_OG
        inside = (folded.codes_OI > -128) & (folded.codes_OI < 127)
        assert (distance[inside] <= 0.5 + 1e-4).all()


def test_sharded_rows_take_weights_of_one_dtype():
    weight_OI, quantizer = make_weight(), LinearQuantizer(make_weight(), IntegerGrid(bits=4), "adascale")
    quantizer.make_shardable(torch.bfloat16)
    quantizer.start(weight_OI.bfloat16())
    assert torch.equal(quantizer.rows.detach(), weight_OI.bfloat16())
    with pytest.raises(QuantizationError, match=r"in torch.float32, another's in torch.bfloat16"):
        quantizer.start(weight_OI)
