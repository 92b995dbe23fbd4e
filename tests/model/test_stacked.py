"""Experts that a model's code multiplies with as one stack: linears compute the same, and hooks see their inputs."""

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import Llama4TextConfig
from transformers.models.inkling.modeling_inkling import InklingSharedExperts
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

from shardq.model.stacked import in_stack, split_stacks

WIDTH, NUM_EXPERTS, TOKENS = 16, 3, 5


class _Config:
    n_shared_experts, moe_intermediate_size, hidden_size, hidden_act = NUM_EXPERTS, 24, WIDTH, "silu"


def llama4() -> tuple[nn.Module, tuple[Tensor, ...], dict[str, tuple[int, int]]]:
    """A module of experts stacked [E, I, O], its inputs, and the shapes of an expert's linears."""
    config = Llama4TextConfig(hidden_size=WIDTH, intermediate_size=24, num_local_experts=NUM_EXPERTS)
    shapes = {"gate_proj": (24, WIDTH), "up_proj": (24, WIDTH), "down_proj": (WIDTH, 24)}
    return Llama4TextExperts(config), (torch.randn(NUM_EXPERTS * TOKENS, WIDTH),), shapes


def inkling() -> tuple[nn.Module, tuple[Tensor, ...], dict[str, tuple[int, int]]]:
    """The same, stacked [E, O, I]."""
    shapes = {"gate_proj": (24, WIDTH), "up_proj": (24, WIDTH), "down_proj": (WIDTH, 24)}
    inputs = torch.randn(1, TOKENS, WIDTH), torch.rand(1, TOKENS, NUM_EXPERTS)
    return InklingSharedExperts(_Config()), inputs, shapes


@pytest.fixture(params=[llama4, inkling])
def experts(request: pytest.FixtureRequest) -> tuple:
    torch.manual_seed(0)
    module, inputs, shapes = request.param()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    return module.requires_grad_(False), inputs, shapes


def split(module: nn.Module) -> nn.Module:
    """A copy of a module with the linears of its experts in place of its stacks, and their values."""
    made, stored = copy.deepcopy(module), module.state_dict()
    views = split_stacks(made, WIDTH)
    made.load_state_dict({name: of(stored[stem]).clone() for name, (stem, of) in views.items()}, assign=True)
    return made


def test_linears_compute_what_the_stacks_did(experts: tuple):
    module, inputs, shapes = experts
    made = split(module)
    assert {name: tuple(weight.shape) for name, weight in made.state_dict().items()} == {
        f"{number}.{name}.weight": shape for number in range(NUM_EXPERTS) for name, shape in shapes.items()
    }
    torch.testing.assert_close(made(*inputs), module(*inputs))
    assert in_stack(made, "1.down_proj") and not in_stack(nn.Sequential(nn.Sequential(nn.Linear(2, 2))), "0.0")


def test_a_copy_computes_with_linears_of_its_own(experts: tuple):
    module, inputs, _ = experts
    made = split(module)
    copied = copy.deepcopy(made)
    made.get_submodule("1.down_proj").weight.zero_()
    torch.testing.assert_close(copied(*inputs), module(*inputs))


def test_hooks_see_what_enters_each_linear(experts: tuple):
    module, inputs, _ = experts
    made, seen = split(module), {}
    for name, linear in made.named_modules():
        if isinstance(linear, nn.Linear):
            linear.register_forward_pre_hook(lambda _, entering, name=name: seen.update({name: entering[0]}))
    made(*inputs)
    expected = inputs[0].reshape(-1, TOKENS, WIDTH).expand(NUM_EXPERTS, -1, -1)
    for number in range(NUM_EXPERTS):
        torch.testing.assert_close(seen[f"{number}.up_proj"], expected[number])


def test_shapes_that_do_not_tell_the_axes_are_left():
    module = nn.Module()
    module.up_proj, module.down_proj = (nn.Parameter(torch.empty(2, WIDTH, WIDTH)) for _ in range(2))
    assert split_stacks(module, WIDTH) == {} and len(list(module.parameters())) == 2


def test_another_use_of_a_stack_is_refused(experts: tuple):
    made = split(experts[0])
    with pytest.raises(TypeError, match="mul of stacked experts"):
        torch.mul(torch.ones(1), made.down_proj)
    stack = made.down_proj
    with pytest.raises(TypeError, match="matmul of stacked experts"):
        torch.matmul(torch.ones(1, 2, 3), stack.transpose(1, 2) if stack.is_transposed else stack)
