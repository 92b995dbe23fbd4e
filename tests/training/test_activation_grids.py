"""Which activations get a grid, what is said of them, and that a block is left as it was."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import FalconConfig

import tiny
from shardq.errors import QuantizationError, UnsupportedModelError
from shardq.matrix import matrices_in
from shardq.model.block import block_plans
from shardq.model.ends import prologue
from shardq.model.recorded import record_arguments
from shardq.model.skeleton import open_skeleton
from shardq.parallel.ranks import Ranks
from shardq.quant.activation import ActivationGrid, ActivationLevels
from shardq.quant.integer_grid import IntegerGrid
from shardq.quant.options import ActivationOptions
from shardq.rundir.plan import Plan
from shardq.training.activation_grids import activation_grids, observed, plan_activations, simulated

ONE_RANK = Ranks(0, 1, torch.device("cpu"))
LINEARS = [["self_attn.q_proj", "mlp.down_proj"], ["mlp.up_proj"], []]


def planned(folder: Path, options: ActivationOptions, linears: list[list[str]] = LINEARS) -> list[dict[str, int]]:
    """Bits of the activations that get a grid, by name within each block, where some linears are quantized."""
    skeleton = open_skeleton(folder)
    with prologue(skeleton, torch.device("cpu")) as embed:
        arguments = record_arguments(skeleton, embed, 8)
    grids = [
        {matrix: IntegerGrid(bits=4) for matrix in matrices_in(block) if matrix.name in names}
        for block, names in zip(skeleton.blocks, linears, strict=True)
    ]
    plan = Plan(blocks=block_plans(skeleton, grids), rest=[]).with_arguments(arguments)
    plan = plan_activations(skeleton, plan, 8, options)
    return [{name: levels.bits for name, levels in block.activations.items()} for block in plan.blocks]


def test_by_default_no_activation_gets_a_grid(llama: Path):
    assert planned(llama, ActivationOptions()) == [{}, {}, {}]


def test_inputs_are_those_of_the_quantized_linears(llama: Path):
    found = planned(llama, ActivationOptions(bits=8))
    assert found == [{"self_attn.q_proj.input": 8, "mlp.down_proj.input": 8}, {"mlp.up_proj.input": 8}, {}]


def test_keys_and_values_may_have_bits_of_their_own(llama: Path):
    kept = {"self_attn.key": 4, "self_attn.value": 4}
    assert planned(llama, ActivationOptions(kv_bits=4)) == [kept] * 3
    every = planned(llama, ActivationOptions(bits=16, tensors="all", kv_bits=4))[2]
    assert len(every) == 28 and {name for name, bits in every.items() if bits == 4} == kept.keys()
    assert planned(llama, ActivationOptions(bits=16, tensors="all"))[2] == dict.fromkeys(every, 16)


def test_keys_and_values_that_cannot_be_reached_are_refused(tmp_path: Path):
    config = FalconConfig(num_hidden_layers=2, hidden_size=32, num_attention_heads=4, vocab_size=64)
    folder = tiny.save_model(tmp_path, config)
    with pytest.raises(UnsupportedModelError, match="keys and values cannot be reached; leave out activations.kv_bits"):
        planned(folder, ActivationOptions(bits=8, kv_bits=8), [[], []])
    assert planned(folder, ActivationOptions(bits=8), [["mlp.dense_h_to_4h"], []])[0] == {"mlp.dense_h_to_4h.input": 8}


class Block(nn.Module):
    """Two linears, one of which is left out when asked."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, hidden: torch.Tensor, whole: bool = True) -> torch.Tensor:
        """Both or the first."""
        hidden = self.first(hidden)
        return self.second(hidden) if whole else hidden


BITS = {"first.input": 8, "second.input": 4}


def observe(options: ActivationOptions, *calls: tuple) -> dict[str, ActivationGrid]:
    block = Block()
    with torch.no_grad(), observed(block, BITS, options) as statistics:
        for call in calls:
            block(*call)
    asked = {name: ActivationLevels(bits=bits, symmetric=options.symmetric) for name, bits in BITS.items()}
    return activation_grids(statistics, asked, options, ONE_RANK)


def test_grids_cover_all_calls_with_the_bits_of_each():
    low, high = -torch.ones(1, 3, 6), torch.full((2, 3, 6), 3.0)
    grids = observe(ActivationOptions(bits=8, symmetric=False), (low,), (high,))
    assert (grids["first.input"].scale, grids["first.input"].zero_point) == (pytest.approx(4 / 255), -128 + 64)
    assert [grids[name].bits for name in BITS] == [8, 4]


def test_grids_of_tokens_are_described_without_looking():
    options = ActivationOptions(bits=8, symmetric=False, granularity="token")
    with observed(Block(), BITS, options) as statistics:
        assert statistics == {}
    assert observe(options) == {name: ActivationGrid(bits, False) for name, bits in BITS.items()}


@pytest.mark.parametrize("values, whole", [(torch.full((1, 2, 6), torch.nan), True), (torch.ones(1, 2, 6), False)])
def test_activations_without_a_range_are_named(values: torch.Tensor, whole: bool):
    with pytest.raises(QuantizationError, match=r"(first|second)\.input: its values are not finite, or no") as raised:
        observe(ActivationOptions(bits=8), (values, whole))
    assert raised.value.agreed


def test_simulation_rounds_what_has_a_grid_and_ends_with_its_body():
    block, hidden = Block(), torch.randn(2, 3, 6)
    with torch.no_grad():
        reference = block(hidden)
        with simulated(block, {"second.input": ActivationGrid(4, True, 0.25, 0)}):
            found = block(hidden)
        inner = (block.first(hidden) / 0.25).round().clamp(-8, 7) * 0.25
        torch.testing.assert_close(found, block.second(inner))
        assert torch.equal(block(hidden), reference)
