"""Quantizers into a block and quantized linears out of it, the rest of the block untouched."""

import pytest
import torch
from torch import Tensor, nn

from shardq.errors import QuantizationError
from shardq.optimize.attach import attach, fold
from shardq.optimize.linear import AdaScaleLinear, Method
from shardq.quant.spec import QuantSpec

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


def trained_block(spec: QuantSpec, method: Method) -> Block:
    """A block with attached quantizers that are no longer at their start."""
    block = Block()
    attach(block, NAMES, spec, method)
    with torch.no_grad():
        for parameter in block.parameters():
            if parameter.requires_grad:
                parameter.uniform_(-0.2, 0.2)
    return block


def unchanged(weight: Tensor) -> Tensor:
    """Stores a weight as it is."""
    return weight


def test_only_the_named_linears_are_replaced():
    block = Block()
    attach(block, NAMES, QuantSpec(bits=4), "adascale")
    kinds = {name: type(module) for name, module in block.named_modules() if name in (*NAMES, "out", "norm")}
    assert kinds == {"mlp.up": AdaScaleLinear, "mlp.down": AdaScaleLinear, "out": nn.Linear, "norm": nn.LayerNorm}
    trained = {name.rpartition(".")[0] for name, parameter in block.named_parameters() if parameter.requires_grad}
    assert trained == set(NAMES)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_folded_block_computes_what_the_trained_one_did(method: Method, symmetric: bool):
    block = trained_block(QuantSpec(bits=3, symmetric=symmetric, group_size=8), method)
    inputs = torch.randn(2, 6, 16)
    expected = block(inputs).detach()
    fold(block, NAMES, unchanged)
    assert torch.equal(block(inputs), expected)


def test_folding_gives_the_block_its_own_linears_back():
    block = Block()
    before = {name: block.get_submodule(name) for name in NAMES}
    names = list(block.state_dict())
    bias = block.mlp.up.bias.clone()
    attach(block, NAMES, QuantSpec(bits=4), "adascale")
    fold(block, NAMES, unchanged)
    assert all(block.get_submodule(name) is linear for name, linear in before.items())
    assert list(block.state_dict()) == names
    assert not any(parameter.requires_grad for parameter in block.parameters())
    assert torch.equal(block.mlp.up.bias, bias)


def test_linears_without_quantizer_keep_their_weights():
    block = Block()
    kept = {name: tensor.clone() for name, tensor in block.state_dict().items() if not name.startswith("mlp.")}
    attach(block, NAMES, QuantSpec(bits=2), "adascale")
    fold(block, NAMES, unchanged)
    assert all(torch.equal(block.state_dict()[name], tensor) for name, tensor in kept.items())


@pytest.mark.parametrize("symmetric", [True, False])
def test_folded_weights_lie_on_the_returned_grid(symmetric: bool):
    spec = QuantSpec(bits=3, symmetric=symmetric, group_size=8)
    block = trained_block(spec, "adascale")
    quantized = fold(block, NAMES, unchanged)
    assert list(quantized) == NAMES
    for name, linear in quantized.items():
        weight_OI = block.get_submodule(name).weight
        scale_OI = linear.scale_OG.repeat_interleave(8, dim=1)
        zero_point_OI = linear.zero_point_OG.repeat_interleave(8, dim=1)
        codes_OI = weight_OI / scale_OI + zero_point_OI
        torch.testing.assert_close(codes_OI, linear.codes_OI.float(), rtol=0, atol=1e-4)
        assert linear.codes_OI.unique().numel() > 4, "hardly a grid"


def test_block_computes_with_the_weights_as_they_are_stored():
    block = trained_block(QuantSpec(bits=4), "adascale")
    quantized = fold(block, NAMES, lambda weight: weight.to(torch.bfloat16))
    for name in NAMES:
        weight_OI = block.get_submodule(name).weight
        assert weight_OI.dtype == torch.float32
        assert torch.equal(weight_OI, quantized[name].dequantized().bfloat16().float())
        assert not torch.equal(weight_OI, quantized[name].dequantized()), "the grid is exact in bfloat16 anyway"


@pytest.mark.parametrize("value", [torch.nan, 1000.0], ids=["nan", "overflow"])
def test_scale_that_is_not_finite_is_refused_by_name(value: float):
    block = trained_block(QuantSpec(bits=4), "adascale")
    with torch.no_grad():
        block.mlp.down.gamma[3] = value
    with pytest.raises(QuantizationError) as caught:
        fold(block, NAMES, unchanged)
    message = str(caught.value)
    assert message.startswith("mlp.down: ") and "scale is not finite and positive" in message and "\n" not in message
    assert "optimize.grid_lr" in message


@pytest.mark.parametrize("name", ["s2", "s3"])
def test_divisor_that_is_not_a_number_is_refused_by_name(name: str):
    block = trained_block(QuantSpec(bits=4), "adascale")
    with torch.no_grad():
        getattr(block.mlp.down, name)[3, 0] = torch.nan
    with pytest.raises(QuantizationError, match="^mlp.down: "):
        fold(block, NAMES, unchanged)
