"""The tokens of routed experts against the router's own choices, and the power of the tokens of all of them."""

import copy

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from shardq.matrix import matrices_in
from shardq.model.block import BlockPlan, LoadedBlock
from shardq.model.experts import adapt_experts
from shardq.training.routing import expert_of, power_of_all_tokens, sampling, watched
from tests.families.tiny_config import tiny_config


def sparse_mlp() -> nn.Module:
    """A sparse MLP of a tiny Qwen3-MoE, its router and its adapted experts, filled with noise."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config("qwen3_moe"))
    adapt_experts(model)
    mlp = copy.deepcopy(model.model.layers[0].mlp).to_empty(device="cpu").requires_grad_(False)
    generator = torch.Generator().manual_seed(3)
    for parameter in mlp.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    return mlp


def test_tokens_are_counted_and_sampled():
    mlp, first_NTD, second_NTD = sparse_mlp(), torch.randn(2, 8, 64), torch.randn(1, 8, 64)
    with watched(mlp, 4) as routing:
        mlp(first_NTD), mlp(second_NTD)
    mlp(first_NTD)  # after the body: not counted
    hidden_TD = torch.cat([first_NTD.flatten(0, 1), second_NTD.flatten(0, 1)])
    chosen_TK = (hidden_TD @ mlp.gate.weight.T).topk(2).indices
    counts = [int((chosen_TK == number).sum()) for number in range(4)]
    assert routing.facts == {"expert_tokens": {"experts": counts}}
    assert torch.equal(torch.cat(routing.sampled["experts"]), hidden_TD[::4])
    least = sorted(counts)[1]
    assert routing.starved(least) == {f"experts.{n}": count for n, count in enumerate(counts) if count < least}
    assert routing.starved(0) == {}


def test_power_of_a_starved_expert_is_of_all_sampled_tokens():
    mlp, hidden_NTD = sparse_mlp(), torch.randn(2, 8, 64)
    matrices = [matrix for matrix in matrices_in(mlp) if matrix.name.startswith("experts.")]
    with watched(mlp, 2) as routing:
        mlp(hidden_NTD)
    loaded = LoadedBlock(plan=BlockPlan(index=0, name="0", is_last=False), module=mlp, source={}, dtype=torch.float32)
    power = power_of_all_tokens(loaded, routing, ["experts.2"], matrices)
    expert, some_TD = mlp.experts.get_submodule("2"), hidden_NTD.flatten(0, 1)[::2]
    inner_TI = nn.functional.silu(expert.gate_proj(some_TD)) * expert.up_proj(some_TD)
    assert set(power) == {matrix.name for matrix in matrices if expert_of(matrix) == "experts.2"}
    torch.testing.assert_close(power["experts.2.up_proj"], some_TD.square().sum(0))
    torch.testing.assert_close(power["experts.2.down_proj"], inner_TI.square().sum(0))


def test_sampled_share_divides_a_sample():
    assert sampling(128, 2048) == 256 and sampling(8, 64) == 1 and sampling(3, 1000) == 2
    assert all(length % sampling(64, length) == 0 for length in (512, 500, 7))
