"""Where a matrix lives in a block."""

import torch
from torch import nn

from shardq.matrix import hooked, matrices_in
from shardq.optimize.block_quantizer import BlockQuantizer
from shardq.quant.adascale import Kernels
from shardq.quant.integer_grid import IntegerGrid


def test_linears_are_the_matrices_of_a_block():
    block = nn.ModuleDict({"norm": nn.LayerNorm(8), "mlp": nn.Sequential(nn.Linear(8, 6), nn.GELU(), nn.Linear(6, 8))})
    first, second = matrices_in(block)
    assert (first.name, first.tensor, first.input) == ("mlp.0", "mlp.0.weight", "mlp.0.input")
    assert (first.shape, first.num_weights) == ((6, 8), 48)
    assert first.weight_in(block) is block["mlp"][0].weight
    assert second.name == "mlp.2" and second.shape == (8, 6)


def test_a_weight_becomes_the_very_tensor_that_is_put_there():
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


def test_memory_of_a_weight_is_freed_when_the_backward_pass_has_used_it():
    """And each weight has its own grid."""
    block = nn.Sequential(nn.Linear(8, 6, bias=False), nn.Linear(6, 8, bias=False)).requires_grad_(False)
    grids = dict(zip(matrices_in(block), (IntegerGrid(bits=3), IntegerGrid(bits=4, group_size=3)), strict=True))
    quantizer = BlockQuantizer(block, grids, "adascale", Kernels(), torch.float32)
    quantizer.start({matrix.tensor: torch.randn(matrix.shape) for matrix in grids})
    quantizer.load(quantizer(), adding_up=True)
    inputs = torch.randn(3, 8)
    expected = torch.func.functional_call(block, {name: value.clone() for name, value in block.state_dict().items()},
                                          (inputs,)).square().sum()  # fmt: skip
    with quantizer.leaving():
        loss = block(inputs.requires_grad_()).square().sum()
    assert loss == expected
    loss.backward()
    assert not any(matrix.weight_in(block).is_contiguous() for matrix in grids), "memory is still taken"
    quantizer.collected().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in quantizer.parameters())
    folded = quantizer.folded()
    quantizer.serve(folded, lambda weight: weight)
    assert [linear.grid for linear in folded.values()] == list(grids.values())
    for matrix in grids:
        assert torch.equal(matrix.weight_in(block), folded[matrix.name].dequantized())
