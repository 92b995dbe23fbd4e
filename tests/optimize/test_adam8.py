"""Adam with 8-bit moments beside torch's Adam, and in the steppers' hands."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from shardq.optimize.options import OptimizeOptions
from shardq.optimize.stepper import LocalStepper, make_optimizer, set_learning_rates, skipped_where

pytest.importorskip("bitsandbytes")

SIZE, STEPS = 1 << 16, 8
OPTIONS = OptimizeOptions(optimizer="adam8", grid_lr=0.01, weight_lr=0.01)


def gradients() -> list[torch.Tensor]:
    """Gradients of a parameter, step by step: what stays the same, and noise; their sizes differ tenfold."""
    generator = torch.Generator().manual_seed(3)
    size = 10 ** torch.rand(SIZE, generator=generator).sub(6)
    lasting = torch.randn(SIZE, generator=generator)
    return [size * (lasting + 0.5 * torch.randn(SIZE, generator=generator)) for _ in range(STEPS)]


def stepped(kind: str) -> tuple[torch.Tensor, torch.optim.Optimizer]:
    """A parameter that starts at 0, after some steps."""
    parameter = nn.Parameter(torch.zeros(SIZE))
    optimizer = make_optimizer(kind, [{"params": [parameter], "start_lr": 0.01}])
    skipped_where(optimizer, parameter.device)
    for done, parameter.grad in enumerate(gradients()):
        set_learning_rates(optimizer, done, STEPS)
        optimizer.step()
    return parameter.detach(), optimizer


def test_steps_are_nearly_adams():
    (ours, _), (theirs, _) = stepped("adam8"), stepped("adam")
    assert ((ours - theirs).norm() / theirs.norm()).item() < 0.1
    assert (ours.sign() == theirs.sign()).float().mean() > 0.97


def test_moments_take_two_bytes_a_weight_and_little_more():
    _, optimizer = stepped("adam8")
    (state,) = optimizer.state.values()
    tables = sum(value.nbytes for name, value in state.items() if name.startswith("qmap"))  # one for all parameters
    total = sum(value.nbytes for value in state.values() if isinstance(value, torch.Tensor))
    assert 2 * SIZE < total - tables <= 2.04 * SIZE


class Quantizers(nn.Module):
    """Just a parameter, by a name that the steppers know."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Module()
        self.linear.s2 = nn.Parameter(torch.zeros(SIZE))


def taken(stepper: LocalStepper, block: Quantizers, some: list[torch.Tensor]) -> None:
    for gradient in some:
        block.linear.s2.grad = gradient.clone()
        stepper.step()


def test_state_that_is_taken_over_leads_to_the_same_bytes():
    blocks = Quantizers(), Quantizers()
    first, second = (LocalStepper(block, OPTIONS) for block in blocks)
    first.start(STEPS)
    taken(first, blocks[0], gradients()[:4])
    saved = {name: value.clone() for name, value in first.state().items()}
    assert saved["0.state1"].dtype == torch.uint8
    taken(first, blocks[0], gradients()[4:])
    second.start(STEPS)
    taken(second, blocks[1], gradients()[2:5])  # what another block left
    second.start(STEPS)
    second.restore(saved, 4)
    taken(second, blocks[1], gradients()[4:])
    assert torch.equal(blocks[0].linear.s2, blocks[1].linear.s2)


def test_start_forgets_the_moments():
    block, other = Quantizers(), Quantizers()
    stepper, fresh = LocalStepper(block, OPTIONS), LocalStepper(other, OPTIONS)
    stepper.start(STEPS)
    taken(stepper, block, gradients())
    with torch.no_grad():
        block.linear.s2.zero_()
    for one, target in ((stepper, block), (fresh, other)):
        one.start(STEPS)
        taken(one, target, gradients()[3:])
    assert torch.equal(block.linear.s2, other.linear.s2)


def test_from_a_gradient_that_is_not_finite_on_no_step_changes_anything():
    block = Quantizers()
    stepper = LocalStepper(block, replace(OPTIONS, weight_lr=0.02))
    stepper.start(STEPS)
    first, *others = gradients()
    taken(stepper, block, [first])
    before = {name: value.clone() for name, value in stepper.state().items()}
    taken(stepper, block, [first.where(torch.arange(SIZE) != 7, torch.nan), *others])
    assert not stepper.is_finite()
    assert all(torch.equal(value, before[name]) for name, value in stepper.state().items())
