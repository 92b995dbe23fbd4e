"""Rounded inputs of linears: the grid points of `rounded`, and gradients that pass straight through."""

import pytest
import torch
from torch import nn

from shardq.matrix import matrices_in
from shardq.optimize.rounded_inputs import RoundedInputs
from shardq.quant.activation import ActivationGrid, rounded
from shardq.quant.options import ActivationOptions

GRIDS = {"0.input": ActivationGrid(4, False, 0.25, -3), "2.input": ActivationGrid(4, False, 0.05, 2)}


def make_block() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))


def by_hand(block: nn.Sequential, values: torch.Tensor, grids: list[ActivationGrid]) -> torch.Tensor:
    inner = block[1](block[0](rounded(values, grids[0])))
    return block[2](rounded(inner, grids[1]))


@pytest.mark.parametrize("granularity", ["tensor", "token"])
def test_inputs_are_rounded_while_it_is_active(granularity: str):
    block, values = make_block(), torch.randn(2, 7, 6)
    options = ActivationOptions(bits=4, symmetric=False, granularity=granularity)
    inputs = RoundedInputs(block, matrices_in(block), options)
    grids = GRIDS if granularity == "tensor" else dict.fromkeys(GRIDS, ActivationGrid(4, False))
    with torch.no_grad():
        plain = block(values)
        with inputs.active(grids):
            found = block(values)
        assert torch.equal(found, by_hand(block, values, list(grids.values())))
        assert torch.equal(block(values), plain)
        following = {name: ActivationGrid(4, False, 1.0, 1) for name in GRIDS} if granularity == "tensor" else grids
        with inputs.active(following):  # the next block's
            found = block(values)
        assert torch.equal(found, by_hand(block, values, list(following.values())))
    with inputs.active({}), pytest.raises(RuntimeError, match="on purpose"):
        raise RuntimeError("on purpose")
    assert not block[0]._forward_pre_hooks


def test_gradients_pass_through_but_for_clipped_values():
    linear = nn.Linear(3, 1, bias=False).requires_grad_(False)
    block = nn.Sequential(linear)
    values = torch.tensor([[0.1, -0.9, 5.0], [-5.0, 0.74, 0.76]], requires_grad=True)
    inputs = RoundedInputs(block, matrices_in(block), ActivationOptions(bits=4))
    with inputs.active({"0.input": ActivationGrid(4, True, 0.125, 0)}):  # from -1 to 0.875
        block(values).sum().backward()
    weight = linear.weight[0]
    is_inside = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]])
    torch.testing.assert_close(values.grad, weight * is_inside)


def test_dtype_stays():
    block = make_block().bfloat16()
    inputs = RoundedInputs(block, matrices_in(block), ActivationOptions(bits=8, granularity="token"))
    with torch.no_grad(), inputs.active({}):
        assert block(torch.randn(2, 6, dtype=torch.bfloat16)).dtype == torch.bfloat16
