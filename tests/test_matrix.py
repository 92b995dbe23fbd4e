"""Where a matrix lives in a block: as a linear's weight, and as one expert of a fused parameter."""

import pytest
import torch
from torch import Tensor, nn

from shardq.errors import UnsupportedModelError
from shardq.matrix import Matrix, assembled, hooked, matrices_in
from shardq.optimize.block_quantizer import BlockQuantizer
from shardq.quant.adascale import Kernels
from shardq.quant.integer_grid import IntegerGrid


class Experts(nn.Module):
    """Two experts in one parameter [E, O, I], each of which computes half of the positions."""

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(2, 6, 8), requires_grad=False)

    def forward(self, hidden_NTD: Tensor) -> Tensor:
        halves = hidden_NTD.chunk(2, 1)
        return torch.cat([half @ expert_OI.T for half, expert_OI in zip(halves, self.up, strict=True)], 1)


class Fused(nn.Module):
    """A block whose experts are in one parameter."""

    def __init__(self):
        super().__init__()
        self.mlp = Experts()

    def forward(self, hidden_NTD: Tensor) -> Tensor:
        return self.mlp(hidden_NTD)


class Separate(nn.Module):
    """The same with a linear for each expert."""

    def __init__(self, fused: Fused):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(8, 6, bias=False) for _ in range(2)).requires_grad_(False)
        for linear, weight_OI in zip(self.experts, fused.mlp.up, strict=True):
            linear.weight.copy_(weight_OI)

    def forward(self, hidden_NTD: Tensor) -> Tensor:
        halves = zip(self.experts, hidden_NTD.chunk(2, 1), strict=True)
        return torch.cat([linear(half) for linear, half in halves], 1)


EXPERTS = [
    Matrix(name=f"mlp.{number}.up", module="mlp", parameter="up", expert=number, shape=(6, 8)) for number in range(2)
]


def test_linears_are_the_matrices_of_a_block():
    block = nn.ModuleDict({"norm": nn.LayerNorm(8), "mlp": nn.Sequential(nn.Linear(8, 6), nn.GELU(), nn.Linear(6, 8))})
    first, second = matrices_in(block)
    assert (first.name, first.tensor, first.input) == ("mlp.0", "mlp.0.weight", "mlp.0.input")
    assert (first.shape, first.num_weights) == ((6, 8), 48)
    assert first.parameter_in(block) is block["mlp"][0].weight
    assert first.of(block.state_dict()).data_ptr() == block["mlp"][0].weight.data_ptr()
    assert second.name == "mlp.2" and second.shape == (8, 6)


def test_an_expert_is_read_and_written_in_its_place():
    block = Fused()
    whole, other = block.mlp.up.data, block.mlp.up[0].clone()
    weight_OI = torch.randn(6, 8)
    EXPERTS[1].put(block, weight_OI)
    assert torch.equal(whole[1], weight_OI) and torch.equal(whole[0], other)
    assert EXPERTS[1].of(block.state_dict()).data_ptr() == whole[1].data_ptr()
    assert EXPERTS[1].tensor == "mlp.up"


def test_parameters_are_made_of_their_matrices():
    block, (second, first) = nn.Sequential(nn.Linear(8, 6)), torch.randn(2, 6, 8)
    whole = torch.randn(6, 8)
    made = assembled([(EXPERTS[1], second), (EXPERTS[0], first), (matrices_in(block)[0], whole)])
    assert made["mlp.up"].tolist() == [first.tolist(), second.tolist()]
    assert made["0.weight"] is whole and len(made) == 2


def test_a_whole_parameter_becomes_the_very_tensor_that_is_put_there():
    block, weight_OI = nn.Sequential(nn.Linear(8, 6)), torch.randn(6, 8)
    (matrix,) = matrices_in(block)
    matrix.put(block, weight_OI)
    assert block[0].weight.data_ptr() == weight_OI.data_ptr()


def test_hooks_see_inputs_in_the_body_and_may_replace_them():
    block, inputs = nn.Sequential(nn.Linear(4, 4, bias=False)), torch.randn(2, 4)
    (matrix,) = matrices_in(block)
    with torch.no_grad():
        with hooked(block, {matrix: lambda module, given: 2 * given[0]}):
            doubled = block(inputs)
        torch.testing.assert_close(doubled, 2 * block(inputs))
    with pytest.raises(UnsupportedModelError, match=r"mlp\.0\.up: what enters one of several fused experts"):
        with hooked(Fused(), {EXPERTS[0]: lambda module, given: None}):
            pass


@pytest.mark.parametrize("method", ["adascale", "rtn"])
def test_experts_of_one_parameter_are_quantized_as_linears_of_their_own_are(method: str):
    """Quantized, trained for a step in two passes, folded and served: to the last bit, with another grid for each."""
    fused = Fused()
    separate = Separate(fused)
    grids_of_each = (IntegerGrid(bits=3), IntegerGrid(bits=4, group_size=4))
    inputs, results = torch.randn(2, 3, 4, 8), []
    for block, matrices in ((fused, EXPERTS), (separate, matrices_in(separate))):
        source = {name: tensor.clone() for name, tensor in block.state_dict().items()}
        grids = dict(zip(matrices, grids_of_each, strict=True))
        quantizer = BlockQuantizer(block, grids, method, Kernels(), torch.float32)
        quantizer.start(source)
        gradients = []
        if method == "adascale":
            with torch.no_grad():
                for parameter in quantizer.parameters():
                    parameter.copy_(torch.linspace(-0.2, 0.2, parameter.numel()).view_as(parameter))
            quantizer.load(quantizer(), adding_up=True)
            block(inputs[0]).square().sum().backward()
            with quantizer.leaving():
                loss = block(inputs[1].clone().requires_grad_()).square().sum()
            loss.backward()
            assert not matrices[0].parameter_in(block).is_contiguous(), "memory is still taken"
            quantizer.collected().backward()
            gradients = [parameter.grad for parameter in quantizer.parameters()]
        folded = quantizer.folded()
        quantizer.serve(folded, lambda weight: weight)
        assert [linear.grid for linear in folded.values()] == list(grids_of_each)
        results.append([*gradients, *(linear.codes_OI for linear in folded.values()), block(inputs[0])])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
