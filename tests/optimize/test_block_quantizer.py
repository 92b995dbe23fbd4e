"""Fake-quantized weights into a block and quantized linears out of it, the rest of the block untouched."""

import weakref
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from shardq.errors import QuantizationError
from shardq.matrix import Matrix, matrices_in
from shardq.optimize.block_quantizer import BlockQuantizer
from shardq.optimize.linear_quantizer import Method
from shardq.quant.adascale import Kernels
from shardq.quant.integer_grid import IntegerGrid
from shardq.quant.quantized import QuantizedLinear

NAMES = ["mlp.up", "mlp.down"]
METHODS = ("adascale", "flexround", "lwc", "rtn")


class Block(nn.Module):
    """A residual block with linears at two depths."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.mlp = nn.Module()
        self.mlp.up = nn.Linear(16, 32)
        self.mlp.down = nn.Linear(32, 16, bias=False)
        self.out = nn.Linear(16, 16)
        self.requires_grad_(False)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.out(self.mlp.down(nn.functional.silu(self.mlp.up(self.norm(hidden)))))


def grids_of(block: nn.Module, grid: IntegerGrid) -> dict[Matrix, IntegerGrid]:
    """The named matrices of the block, all on one grid."""
    return {matrix: grid for matrix in matrices_in(block) if matrix.name in NAMES}


def started(block: Block, grid: IntegerGrid, method: Method, dtype: torch.dtype = torch.float32) -> BlockQuantizer:
    """Quantizers of the block's named linears, at the start for its weights."""
    source = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    quantizer = BlockQuantizer(block, grids_of(block, grid), method, Kernels(), dtype)
    quantizer.start(source)
    return quantizer


def trained(block: Block, grid: IntegerGrid, method: Method, dtype: torch.dtype = torch.float32) -> BlockQuantizer:
    """Quantizers that are no longer at their start, their weights in the block."""
    quantizer = started(block, grid, method, dtype)
    with torch.no_grad():
        for parameter in quantizer.parameters():
            parameter.uniform_(-0.2, 0.2)
    quantizer.load(quantizer())
    return quantizer


def unchanged(weight: Tensor) -> Tensor:
    """Stores a weight as it is."""
    return weight


def served(quantizer: BlockQuantizer, stored: Callable[[Tensor], Tensor] = unchanged) -> dict[str, QuantizedLinear]:
    """What training has made of the linears, written into the block."""
    linears = quantizer.folded()
    quantizer.serve(linears, stored)
    quantizer.release()
    return linears


@pytest.mark.parametrize("method", METHODS)
def test_block_starts_with_its_weights_rounded_to_the_nearest(method: Method):
    block = Block()
    block.mlp.up.weight[0, :4] = torch.tensor([-4.0, -1.6, 0.4, 2.6])  # 3 bits: the step is 1
    quantizer = started(block, IntegerGrid(bits=3), method)
    quantizer.load(quantizer())
    assert block.mlp.up.weight[0, :4].tolist() == [-4, -2, 0, 3]
    assert not block.mlp.up.weight[0, 4:].any()  # a fresh linear's weights are at most 1/4


@pytest.mark.parametrize("method", METHODS)
def test_restart_leads_back_to_the_start_without_the_source(method: Method):
    block = Block()
    quantizer = started(block, IntegerGrid(bits=3, symmetric=False), method)
    start = quantizer.folded()
    with torch.no_grad():
        for parameter in quantizer.parameters():
            parameter.fill_(torch.nan)
    quantizer.restart()
    for name, linear in quantizer.folded().items():
        assert torch.equal(linear.codes_OI, start[name].codes_OI)
        assert torch.equal(linear.scale_OG, start[name].scale_OG)
        assert torch.equal(linear.zero_point_OG, start[name].zero_point_OG)


def test_only_the_named_linears_weights_are_overwritten():
    block = Block()
    before = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    modules = dict(block.named_modules())
    quantizer = trained(block, IntegerGrid(bits=2), "adascale")
    (block(torch.randn(2, 6, 16)) ** 2).sum().backward()
    assert dict(block.named_modules()) == modules
    assert {name for name, parameter in block.named_parameters() if parameter.grad is not None} == {
        f"{name}.weight" for name in NAMES
    }
    served(quantizer)
    changed = {name for name, tensor in block.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {f"{name}.weight" for name in NAMES}
    assert list(block.state_dict()) == list(before)


def test_weights_of_the_block_are_no_parameters_of_the_quantizer():
    trained_names = {name for name, _ in trained(Block(), IntegerGrid(bits=4), "lwc").named_parameters()}
    assert trained_names == {f"quantizers.{i}.{name}" for i in (0, 1) for name in ("beta", "gamma")}


def loaded(quantizer: BlockQuantizer, adding_up: bool = False) -> list[Tensor]:
    """Fake-quantized weights that are now in the block, cut off from what they were computed from."""
    weights = [weight.detach().clone().requires_grad_() for weight in quantizer()]
    quantizer.load(weights, adding_up)
    return weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", METHODS[:3])
def test_gradients_of_several_passes_add_up_in_float32(method: Method, dtype: torch.dtype):
    """Added up in bfloat16, so many would be off by some hundredths."""
    block = Block()
    weights = loaded(quantizer := trained(block, IntegerGrid(bits=4), method, dtype), adding_up=True)
    leaves = {
        f"{name}.weight": weight.detach().clone().requires_grad_() for name, weight in zip(NAMES, weights, strict=True)
    }
    passes = torch.randn(64, 3, 16)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        for inputs in passes:
            block(inputs).square().sum().backward()
        losses = [torch.func.functional_call(block, leaves, inputs).square().sum() for inputs in passes]
    quantizer.collected().backward()
    parts = [torch.autograd.grad(loss, leaves.values()) for loss in losses]
    rounding = 1e-5 if dtype == torch.float32 else 2**-8
    for weight, gradients in zip(weights, zip(*parts, strict=True), strict=True):
        assert weight.grad.dtype == dtype
        exact = sum(gradient.double() for gradient in gradients)
        torch.testing.assert_close(weight.grad.double(), exact, rtol=rounding, atol=1e-5 * exact.abs().max().item())


def test_gradients_not_collected_are_dropped_by_quantizing_anew():
    block = Block()
    quantizer = trained(block, IntegerGrid(bits=4), "adascale")
    block(torch.randn(3, 16)).square().sum().backward()
    inputs, gradients = torch.randn(3, 16), []
    for _ in range(2):
        weights = loaded(quantizer)
        block(inputs).square().sum().backward()
        quantizer.collected().backward()
        gradients.append([weight.grad for weight in weights])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


def test_one_linear_after_the_other_makes_room_for_the_gradients_of_s2():
    block, alive = Block(), []
    quantizer = trained(block, IntegerGrid(bits=4), "adascale")
    linears = [block.get_submodule(name) for name in NAMES]
    block(torch.randn(3, 16)).square().sum().backward()
    gradients = [weakref.ref(linear.weight.grad) for linear in linears]
    for linear_quantizer in quantizer.quantizers:
        linear_quantizer.s2.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(gradient() is not None for gradient in gradients))
        )
    quantizer.collected().backward()
    assert alive in ([1, 0], [2, 1])
    assert not any(linear.weight.is_contiguous() for linear in linears), "memory is still taken"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_leave_the_block_once_their_last_use_is_past(dtype: torch.dtype):
    """The block is used twice, so a weight is asked for twice on the way back."""
    block, gradients, there = Block(), [], []
    quantizer, inputs = trained(block, IntegerGrid(bits=4), "adascale", dtype), torch.randn(2, 3, 16)
    linears = [block.get_submodule(name) for name in NAMES]
    for context in (nullcontext, quantizer.leaving):
        weights = loaded(quantizer)
        with context(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            first = inputs.clone().requires_grad_()
            between = block(first)
            loss = block(between).square().sum()
        between.register_hook(lambda _: there.append([linear.weight.is_contiguous() for linear in linears]))
        loss.backward()
        there.append([linear.weight.is_contiguous() for linear in linears])
        quantizer.collected().backward()
        gradients.append([weight.grad for weight in weights])
    assert there == [[True, True]] * 3 + [[False, False]]
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


def test_weights_in_bfloat16_give_float32_gradients():
    block = Block()
    quantizer = trained(block, IntegerGrid(bits=4, group_size=8), "adascale", torch.bfloat16)
    assert all(block.get_submodule(name).weight.dtype == torch.bfloat16 for name in NAMES)
    with torch.autocast("cpu", torch.bfloat16):
        block(torch.randn(3, 16)).square().sum().backward()
    quantizer.collected().backward()
    for name, parameter in quantizer.named_parameters():
        assert parameter.dtype == parameter.grad.dtype == torch.float32, name
        assert parameter.grad.any() and parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_folded_block_computes_what_the_trained_one_did(method: Method, symmetric: bool):
    block = Block()
    quantizer = trained(block, IntegerGrid(bits=3, symmetric=symmetric, group_size=8), method)
    inputs = torch.randn(2, 6, 16)
    expected = block(inputs).detach()
    served(quantizer)
    assert torch.equal(block(inputs), expected)


def test_folded_block_is_frozen_and_keeps_nothing_of_its_training():
    block = Block()
    quantizer = trained(block, IntegerGrid(bits=4), "adascale")
    block(torch.randn(3, 16)).sum().backward()
    served(quantizer)
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in block.parameters())
    assert all(linear.rows is None for linear in quantizer.quantizers), "the source weight is still held"


@pytest.mark.parametrize("symmetric", [True, False])
def test_folded_weights_lie_on_the_returned_grid(symmetric: bool):
    block = Block()
    quantized = served(trained(block, IntegerGrid(bits=3, symmetric=symmetric, group_size=8), "adascale"))
    assert list(quantized) == NAMES
    for name, linear in quantized.items():
        weight_OI = block.get_submodule(name).weight
        scale_OI = linear.scale_OG.repeat_interleave(8, dim=1)
        zero_point_OI = linear.zero_point_OG.repeat_interleave(8, dim=1)
        codes_OI = weight_OI / scale_OI + zero_point_OI
        torch.testing.assert_close(codes_OI, linear.codes_OI.float(), rtol=0, atol=1e-4)
        assert linear.codes_OI.unique().numel() > 4, "hardly a grid"


def test_block_computes_with_the_weights_as_they_are_stored():
    block = Block()
    quantized = served(trained(block, IntegerGrid(bits=4), "adascale"), lambda weight: weight.to(torch.bfloat16))
    for name in NAMES:
        weight_OI = block.get_submodule(name).weight
        assert weight_OI.dtype == torch.float32
        assert torch.equal(weight_OI, quantized[name].dequantized().bfloat16().float())
        assert not torch.equal(weight_OI, quantized[name].dequantized()), "the grid is exact in bfloat16 anyway"


@pytest.mark.parametrize("value", [torch.nan, 1000.0], ids=["nan", "overflow"])
def test_scale_that_is_not_finite_is_refused_by_name(value: float):
    quantizer = trained(Block(), IntegerGrid(bits=4), "adascale")
    with torch.no_grad():
        quantizer.quantizers[NAMES.index("mlp.down")].gamma[3] = value
    with pytest.raises(QuantizationError) as caught:
        quantizer.folded()
    message = str(caught.value)
    assert message.startswith("mlp.down: ") and "scale is not finite and positive" in message and "\n" not in message
    assert "optimize.grid_lr" in message


@pytest.mark.parametrize("bits, weight", [(4, 1e6), (4, -1e6), (8, 1e7)])
def test_weight_beyond_the_scales_of_a_target_is_no_matter_of_learning_rates(bits: int, weight: float):
    block = Block()
    block.mlp.down.weight[3] = weight
    with pytest.raises(QuantizationError) as caught:
        started(block, IntegerGrid(bits=bits, scale_dtype="float16"), "adascale").folded()
    message = str(caught.value)
    assert message.startswith("mlp.down: ") and "beyond what float16 holds" in message and "\n" not in message
    assert "--quant.ignore" in message and "grid_lr" not in message
    started(block, IntegerGrid(bits=bits, scale_dtype="bfloat16"), "adascale").folded()


@pytest.mark.parametrize("name", ["s2", "s3"])
def test_divisor_that_is_not_a_number_is_refused_by_name(name: str):
    quantizer = trained(Block(), IntegerGrid(bits=4), "adascale")
    with torch.no_grad():
        getattr(quantizer.quantizers[NAMES.index("mlp.down")], name)[3, 0] = torch.nan
    with pytest.raises(QuantizationError, match="^mlp.down: "):
        quantizer.folded()


def test_weights_that_were_served_in_between_do_not_disturb_training():
    block, source = Block(), None
    source = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    quantizer = started(block, IntegerGrid(bits=3), "adascale")
    served_linears = quantizer.folded()
    with torch.no_grad():
        quantizer.quantizers[0].s2.uniform_(-0.5, 0.5)
    quantizer.load(quantizer())
    expected = [block.get_submodule(name).weight.detach().clone() for name in NAMES]
    quantizer.serve(served_linears, unchanged)
    assert not torch.equal(block.get_submodule(NAMES[0]).weight, expected[0])
    quantizer.load(quantizer())
    for name, weight in zip(NAMES, expected, strict=True):
        linear = block.get_submodule(name)
        assert torch.equal(linear.weight, weight) and linear.weight.requires_grad
    assert torch.equal(quantizer.quantizers[0].rows, source[f"{NAMES[0]}.weight"])


def test_start_is_searched_where_importance_is_given():
    grid, importance = IntegerGrid(bits=3, group_size=8), {"mlp.up": torch.rand(16), "mlp.down": torch.rand(32)}
    block = Block()
    source = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    quantizer = BlockQuantizer(block, grids_of(block, grid), "adascale", Kernels(), torch.float32)

    def errors() -> dict[str, Tensor]:
        folded = quantizer.folded()
        return {
            name: ((folded[name].dequantized() - source[f"{name}.weight"]).square() * importance[name]).sum()
            for name in NAMES
        }

    quantizer.start(source)
    plain = errors()
    quantizer.start(source, importance)
    for name, error in errors().items():
        assert error < 0.9 * plain[name], name


def test_fixed_matrix_stays_at_its_start():
    grid, block = IntegerGrid(bits=4, group_size=8), Block()
    source = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    quantizer = started(block, grid, "adascale")
    start = quantizer.folded()
    quantizer.start(source, fixed={"mlp.down"})
    optimizer = torch.optim.Adagrad(quantizer.parameters(), lr=0.05)
    for _ in range(3):
        quantizer.load(quantizer())
        block(torch.randn(4, 16)).square().sum().backward()
        quantizer.collected().backward()
        optimizer.step()
    trained = quantizer.folded()
    assert torch.equal(trained["mlp.down"].codes_OI, start["mlp.down"].codes_OI)
    assert torch.equal(trained["mlp.down"].scale_OG, start["mlp.down"].scale_OG)
    assert not torch.equal(trained["mlp.up"].scale_OG, start["mlp.up"].scale_OG)
