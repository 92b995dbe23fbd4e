"""A grid that is not one of integers, defined here: what trains, folds and packs weights asks nothing but the grid."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from shardq.compiling import compiler, why_not
from shardq.errors import ConfigError
from shardq.formats import compressed_tensors, encodings, gguf_tensors, gptq, onnx_graph
from shardq.optimize.linear_quantizer import LinearQuantizer
from shardq.quant import packing
from shardq.quant.adascale import Kernels
from shardq.quant.grid import SCALE_FLOOR, Grid
from shardq.quant.quantized import QuantizedLinear

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # those of e2m1: the place of each is its exponent and mantissa


@dataclass(frozen=True, kw_only=True)
class FloatGrid(Grid):
    """E2m1 under power-of-two scales; the code of a negative level is that of its magnitude, and 8 more."""

    bits: int = 4
    group_size: int | None = 8
    qmin = 0
    num_steps = 12

    @property
    def description(self) -> str:
        return f"e2m1, {self.extent}"

    def nearest(self, steps_Rg: Tensor, zero_point_R1: Tensor) -> Tensor:
        size_Rg = steps_Rg.abs()
        spacing_Rg = torch.where(size_Rg < 2, 0.5, torch.where(size_Rg < 4, 1.0, 2.0))
        return ((steps_Rg / spacing_Rg).round() * spacing_Rg).clamp(-6, 6)

    def is_inside(self, steps_Rg: Tensor, levels_Rg: Tensor) -> Tensor:
        return steps_Rg.abs() <= 7

    def encode(self, rows_Rg: Tensor, scale_R1: Tensor, zero_point_R1: Tensor) -> Tensor:
        levels_Rg = self.nearest(rows_Rg / scale_R1, zero_point_R1)
        places_Rg = torch.searchsorted(torch.tensor(MAGNITUDES), levels_Rg.abs())
        return (places_Rg + 8 * (levels_Rg < 0)).to(torch.int8)

    def decode(self, codes_Rg: Tensor, scale_R1: Tensor, zero_point_R1: Tensor) -> Tensor:
        return torch.tensor(MAGNITUDES + tuple(-size for size in MAGNITUDES))[codes_Rg.int()] * scale_R1

    def start_range(self, rows_Rg: Tensor) -> tuple[Tensor, Tensor]:
        furthest_R1 = rows_Rg.abs().amax(1, keepdim=True).clamp(min=6 * SCALE_FLOOR)
        return -furthest_R1, furthest_R1

    def kept_scale(self, scale_R1: Tensor, num_groups: int | None = None) -> Tensor:
        return scale_R1.log2().round().exp2()


GRID = FloatGrid()


def make_weight() -> Tensor:
    """A weight of 6 outputs and 32 inputs whose groups differ in size."""
    return torch.randn(6, 32) * torch.rand(6, 4).exp().repeat_interleave(8, 1)


def nearest_level(value: float) -> float:
    """The nearest level; half way between two, the one of the even mantissa."""
    distances = [abs(abs(value) - size) for size in MAGNITUDES]
    nearest = [place for place, distance in enumerate(distances) if distance == min(distances)]
    place = next((place for place in nearest if place % 2 == 0), nearest[0])
    return MAGNITUDES[place] if value > 0 else -MAGNITUDES[place]


@pytest.fixture(name="kernels", params=["plain", "compiled"])
def _kernels(request) -> Kernels:
    if request.param == "plain":
        return Kernels()
    if reason := why_not(torch.device("cpu")):
        pytest.skip(reason)

    def refused(reason: str) -> None:
        raise AssertionError(f"the plain functions ran in their place: {reason}")

    compiled = compiler(torch.device("cpu"), refused)
    return Kernels(*(compiled(kernel, True) for kernel in Kernels()))


def test_start_rounds_to_the_nearest_levels_under_a_power_of_two(kernels: Kernels):
    weight_OI = make_weight()
    weight_OI[0, :8] = torch.tensor(
        [6.0, 0.25, 0.75, -1.25, 1.75, 2.5, -3.5, 5.0]
    )  # half way between levels, all but 6
    quantizer = LinearQuantizer(weight_OI, GRID, "adascale")
    quantizer.start(weight_OI)
    found_OI = quantizer(torch.float32, kernels)
    for row, found in zip(weight_OI.view(-1, 8), found_OI.view(-1, 8), strict=True):
        scale = 2.0 ** round(torch.log2(row.abs().amax() / 6).item())
        assert found.tolist() == [nearest_level(value / scale) * scale for value in row.tolist()]


def test_gradients_are_those_of_plain_autograd(kernels: Kernels):
    weight_OI, grad_OI = make_weight(), torch.randn(6, 32)
    quantizer = LinearQuantizer(weight_OI, GRID, "adascale")
    quantizer.start(weight_OI)
    for parameter in quantizer.parameters():
        parameter.data.uniform_(-0.3, 0.3)
    quantizer(torch.float32, kernels).backward(grad_OI)

    def straight_through(values: Tensor, rounded: Callable[[Tensor], Tensor]) -> Tensor:
        return values + (rounded(values) - values).detach()

    naive = {name: value.detach().clone().requires_grad_() for name, value in quantizer.named_parameters()}
    end = weight_OI.view(-1, 8).abs().amax(1, keepdim=True)
    scale = straight_through(
        (naive["gamma"].exp() * end + naive["beta"].exp() * end) / 12,
        lambda exact: 2.0 ** torch.log2(exact).round(),
    )
    steps = weight_OI.view(-1, 8) / naive["s2"].exp() / naive["s3"].exp() / scale
    levels = straight_through(steps, lambda exact: exact.detach().clone().apply_(nearest_level))
    beyond = steps.detach().abs() > 7
    expected = torch.where(beyond, 6 * steps.detach().sign(), levels) * scale
    expected.backward(grad_OI.view(-1, 8))
    assert beyond.any()
    for name, value in quantizer.named_parameters():
        torch.testing.assert_close(value.grad, naive[name].grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("is_searched", [False, True], ids=["min-max", "searched"])
def test_training_lowers_the_loss_and_ends_on_the_levels(kernels: Kernels, is_searched: bool):
    weight_OI, inputs_NI = make_weight(), torch.randn(64, 4) @ torch.randn(4, 32)  # errors can cancel out
    quantizer = LinearQuantizer(weight_OI, GRID, "adascale")
    quantizer.start(weight_OI, inputs_NI.square().mean(0) if is_searched else None)
    weights, ends = [quantizer.s2, quantizer.s3], [quantizer.beta, quantizer.gamma]
    optimizer = torch.optim.Adam([{"params": weights, "lr": 2e-3}, {"params": ends, "lr": 5e-5}])

    def loss_of(found_OI: Tensor) -> Tensor:
        return (inputs_NI @ (found_OI - weight_OI).T).square().mean()

    start = loss_of(quantizer(torch.float32, kernels)).item()
    for _ in range(100):
        optimizer.zero_grad()
        loss_of(quantizer(torch.float32, kernels)).backward()
        optimizer.step()
    folded = quantizer.folded()
    assert folded.has_valid_scales and loss_of(folded.dequantized()).item() < 0.7 * start
    assert torch.equal(folded.dequantized(), quantizer(torch.float32, kernels).detach())
    assert torch.equal(folded.scale_OG.log2(), folded.scale_OG.log2().round())
    levels = folded.dequantized().view(6, 4, 8) / folded.scale_OG[..., None]
    assert set(levels.abs().flatten().tolist()) <= set(MAGNITUDES)


def test_codes_survive_packing_and_rescaling_keeps_powers_of_two():
    weight_OI = make_weight()
    quantizer = LinearQuantizer(weight_OI, GRID, "rtn")
    quantizer.start(weight_OI)
    folded = quantizer.folded()
    assert torch.equal(packing.unpack(packing.pack(folded.codes_OI, GRID), 32, GRID), folded.codes_OI)
    assert folded.with_positive_scales() is folded
    doubled = folded.rescaled(torch.full((6, 4), 0.6))  # exp(0.6) is nearer to 2 than to 1
    assert torch.equal(doubled.scale_OG, 2 * folded.scale_OG)
    assert (GRID.name, GRID.description, GRID.num_scales(6, 32)) == ("w4-g8", "e2m1, in groups of 8", 24)


def linear() -> QuantizedLinear:
    codes_OI = torch.zeros(32, 32, dtype=torch.int8)
    return QuantizedLinear(codes_OI, torch.ones(32, 4), torch.zeros(32, 4), GRID)


@pytest.mark.parametrize(
    ("format_name", "ask"),
    [
        ("gptq", lambda: gptq.check_grid(GRID)),
        ("gptq", lambda: gptq.quantization_config(GRID, [])),
        ("compressed-tensors", lambda: compressed_tensors.check_grid(GRID, 16)),
        ("compressed-tensors", lambda: compressed_tensors.quantization_config(GRID, 16, [])),
        ("gguf", lambda: gguf_tensors.block_type(GRID)),
        ("onnx", lambda: onnx_graph.linear_tensors("a", linear())),
        ("aimet", lambda: encodings.item_of("1.0.0", "a", linear())),
    ],
)
def test_formats_of_integer_codes_refuse_it(format_name: str, ask: Callable[[], object]):
    with pytest.raises(ConfigError, match=f"{format_name}: only integer grids are supported, not e2m1, in groups of 8"):
        ask()
    assert not gptq.is_served_by_vllm(GRID)
