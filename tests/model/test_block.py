"""What a block gives when it is called, and what is known of it before it is loaded."""

import pytest
import torch
from torch import Tensor, nn

from shardq.matrix import matrices_in
from shardq.model.arguments import BlockArguments, Call
from shardq.model.block import BlockPlan, LoadedBlock, run_block
from shardq.quant.integer_grid import IntegerGrid


class TestRunBlock:
    def test_block_that_returns_more_than_hidden_states_gives_only_those(self):
        class Talkative(nn.Module):
            def forward(self, hidden: Tensor, factor: int) -> tuple[Tensor, str]:
                return hidden * factor, "attention weights"

        given = torch.ones(1, 2, 3)
        assert torch.equal(run_block(Talkative(), Call(given, (), {"factor": 3}), torch.float32), given * 3)
        assert torch.equal(run_block(Talkative(), Call(given, (4,), {}), torch.float32), given * 4)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_matrix_multiplies_alone_are_in_the_dtype(self, dtype: torch.dtype):
        class Block(nn.Module):
            def __init__(self):
                super().__init__()
                self.linear, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)

            def forward(self, hidden: Tensor) -> Tensor:
                self.multiplied = self.linear(hidden)
                self.normed = self.norm(hidden)
                return self.multiplied + hidden

        block, hidden_NTD = Block(), torch.randn(2, 4, 8)
        output_NTD = run_block(block, Call(hidden_NTD, (), {}), dtype)
        product = hidden_NTD.to(dtype) @ block.linear.weight.to(dtype).T + block.linear.bias.to(dtype)
        assert (block.multiplied.dtype, block.normed.dtype, output_NTD.dtype) == (dtype, torch.float32, torch.float32)
        torch.testing.assert_close(output_NTD, product.float() + hidden_NTD, rtol=1e-2, atol=1e-2)

    def test_output_of_a_block_that_leaves_in_bfloat16_is_float32(self):
        output_NTD = run_block(nn.Linear(8, 8), Call(torch.randn(1, 2, 8), (), {}), torch.bfloat16)
        assert output_NTD.dtype == torch.float32


class TestBlockPlan:
    def test_numbers_are_added_up_over_matrices_each_on_its_own_grid(self):
        block = nn.Sequential(nn.Linear(32, 8), nn.Linear(8, 4))
        first, second = matrices_in(block)
        grids = {first: IntegerGrid(bits=4, group_size=16), second: IntegerGrid(bits=8)}
        plan = BlockPlan(index=3, name="model.layers.3", is_last=False, grids=grids)
        assert plan.num_weights == 32 * 8 + 8 * 4 and plan.num_scales == 8 * 2 + 4
        assert [plan.full_name(matrix) for matrix in plan.grids] == ["model.layers.3.0", "model.layers.3.1"]


class TestLoadedBlock:
    def test_it_is_called_with_what_the_model_passes(self):
        class Scaled(nn.Module):
            def forward(self, hidden: Tensor, offset: int, factor: int) -> tuple[Tensor]:
                return (hidden * factor + offset,)

        arguments = BlockArguments(0, (1,), {"factor": 3}, width=4)
        plan = BlockPlan(index=0, name="layers.0", is_last=True, arguments=arguments)
        loaded = LoadedBlock(plan=plan, module=Scaled(), source={}, dtype=torch.float32)
        hidden_NTD = torch.randn(2, 3, 4)
        assert torch.equal(loaded(hidden_NTD), hidden_NTD * 3 + 1) and loaded.index == 0
