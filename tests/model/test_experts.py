"""Fused experts as numbered linears compute what transformers' own loop computes, whatever their layout."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from shardq.errors import UnsupportedModelError
from shardq.model.experts import adapt_experts, is_routed, routed_in
from tests.families.tiny_config import tiny_config

# Concatenated, with biases and in turns and transposed, without a gate, and with other activations.
FAMILIES = ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "nemotron_h", "granitemoe"]
UNTOLD = ["dbrx", "longcat_flash", "jetmoe"]


def tiny_model(family: str) -> nn.Module:
    config = tiny_config(family)
    config._experts_implementation = "eager"
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def first_experts(model: nn.Module) -> nn.Module:
    return next(module for module in model.modules() if is_routed(module))


def filled(module: nn.Module) -> nn.Module:
    """The module with noise for weights."""
    generator = torch.Generator().manual_seed(0)
    module = module.to_empty(device="cpu")
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / 4
    return module


@pytest.mark.parametrize("family", FAMILIES)
def test_adapted_experts_compute_what_the_fused_ones_do(family: str):
    fused = first_experts(tiny_model(family))
    adapted, fused = copy.deepcopy(fused), filled(fused)
    fused.config._experts_implementation = "eager"
    views = adapt_experts(adapted)
    assert set(views) == set(adapted.state_dict())
    stored = fused.state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in stored.items()} == {v.fused: v.shape for v in views.values()}
    adapted = adapted.to_empty(device="cpu")
    adapted.load_state_dict({name: view.of(stored[view.fused]) for name, view in views.items()})

    width = next(module for module in adapted.modules() if isinstance(module, nn.Linear)).in_features
    generator = torch.Generator().manual_seed(1)
    hidden_TD = torch.randn(40, width, generator=generator)
    index_TK = torch.rand(40, 3, generator=generator).topk(2).indices  # the last expert gets no token
    weight_TK = torch.rand(40, 2, generator=generator)
    outputs, gradients = [], []
    for module in (fused, adapted):
        inputs = [hidden_TD.clone().requires_grad_(), weight_TK.clone().requires_grad_()]
        outputs.append(module(inputs[0], index_TK, inputs[1]))
        outputs[-1].square().sum().backward()
        gradients.append([tensor.grad for tensor in inputs])
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-5 * float(outputs[0].detach().abs().max()))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5 * float(one.abs().max()))
    for name, parameter in adapted.named_parameters():
        wanted = views[name].of(dict(fused.named_parameters())[views[name].fused].grad)
        got = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


def test_index_beyond_the_experts_is_a_mask():
    adapted = first_experts(tiny_model("mixtral"))
    adapt_experts(adapted)
    adapted = filled(adapted)
    hidden_TD, weight_TK = torch.randn(5, 64), torch.rand(5, 2)
    kept_TK = torch.tensor([[0, 4], [4, 4], [1, 0], [4, 2], [3, 1]])
    output_TD = adapted(hidden_TD, kept_TK, weight_TK)
    other_TD = adapted(hidden_TD, kept_TK.clamp(max=3), weight_TK * (kept_TK < 4))
    assert not output_TD[1].any()
    torch.testing.assert_close(output_TD, other_TD)


def test_router_stays_and_every_fused_parameter_goes():
    model = tiny_model("qwen3_moe")
    before = {name for name, _ in model.named_parameters() if ".experts." not in name}
    views = adapt_experts(model)
    after = dict(model.named_parameters())
    assert {name for name in after if name not in views} == before
    assert all(after[name].dim() <= 2 for name in views) and len(routed_in(model)) == 3
    assert "model.layers.0.mlp.gate.weight" in before
    assert views["model.layers.0.mlp.experts.3.up_proj.weight"].fused == "model.layers.0.mlp.experts.gate_up_proj"


@pytest.mark.parametrize("family", UNTOLD)
def test_experts_that_do_not_tell_their_layout_are_refused(family: str):
    with pytest.raises(UnsupportedModelError, match=r"whose layout it does not tell \(is_concatenated, "):
        adapt_experts(tiny_model(family))


def test_on_the_meta_device_all_experts_get_as_many_tokens():
    adapted = first_experts(tiny_model("granitemoe"))
    adapt_experts(adapted)
    seen: list[int] = []
    for number in range(4):
        linear = adapted.get_submodule(f"{number}.down_proj")
        linear.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    hidden_TD, index_TK = torch.empty(7, 64, device="meta"), torch.empty(7, 2, dtype=torch.int64, device="meta")
    assert adapted(hidden_TD, index_TK, torch.empty(7, 2, device="meta")).shape == (7, 64)
    assert seen == [3, 3, 4, 4]
