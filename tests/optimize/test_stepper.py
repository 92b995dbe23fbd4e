"""Optimizers on one rank: which parameters, at which learning rates, from which gradients."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from shardq.optimize.options import OptimizeOptions
from shardq.optimize.stepper import LocalStepper, trainable

ITERATIONS, GRID_LR, WEIGHT_LR = 8, 1e-2, 3e-3
OPTIONS = OptimizeOptions(iterations=ITERATIONS, grid_lr=GRID_LR, weight_lr=WEIGHT_LR, optimizer="adam")
GRID, WEIGHT = ("beta", "gamma", "step"), ("s2", "s3")


class Quantizer(nn.Module):
    """Named parameters as a linear's quantizer has them, and a frozen one."""

    def __init__(self, *names: str):
        super().__init__()
        for name in names:
            self.register_parameter(name, nn.Parameter(torch.zeros(3)))
        self.frozen = nn.Parameter(torch.zeros(3), requires_grad=False)


def make_block(*names: str) -> nn.Module:
    """A block with one quantizer in the place of a linear."""
    block = nn.Module()
    block.linear = Quantizer(*names)
    return block


def started(block: nn.Module, options: OptimizeOptions = OPTIONS) -> LocalStepper:
    """A stepper over a block's parameters, at the start of its schedule."""
    stepper = LocalStepper(block, options)
    stepper.start(ITERATIONS)
    return stepper


def collect(stepper: LocalStepper, block: nn.Module, factor: float = 1.0) -> None:
    """Give the stepper a loss; each trained element's gradient is `factor`."""
    stepper.backward(sum(factor * parameter.sum() for parameter in block.parameters() if parameter.requires_grad))


def test_grid_and_weight_parameters_are_told_apart_and_frozen_ones_left_out():
    block = make_block(*GRID, *WEIGHT)
    grid, weight = trainable(block)
    assert [id(parameter) for parameter in grid] == [id(getattr(block.linear, name)) for name in GRID]
    assert [id(parameter) for parameter in weight] == [id(getattr(block.linear, name)) for name in WEIGHT]


def test_learning_rates_fall_from_their_start_to_zero_along_a_cosine():
    block = make_block("beta", "s2")
    stepper = started(block)
    expected = {"beta": 0.0, "s2": 0.0}
    for iteration in range(ITERATIONS):
        collect(stepper, block)
        stepper.step()
        # Adam moves by its learning rate where the gradient is the same at every step.
        for name, lr in (("beta", GRID_LR), ("s2", WEIGHT_LR)):
            expected[name] -= lr * (1 + math.cos(math.pi * iteration / ITERATIONS)) / 2
            torch.testing.assert_close(getattr(block.linear, name), torch.full((3,), expected[name]), rtol=1e-4, atol=0)


def test_rms_divides_by_the_root_of_the_mean_of_all_squared_gradients():
    block = make_block("s2")
    stepper = started(block, replace(OPTIONS, optimizer="rms"))
    gradients, expected = [3.0, -1.0, 0.5, 2.0, -4.0], 0.0
    for iteration, gradient in enumerate(gradients):
        collect(stepper, block, gradient)
        stepper.step()
        seen = gradients[: iteration + 1]
        lr = WEIGHT_LR * (1 + math.cos(math.pi * iteration / ITERATIONS)) / 2
        expected -= lr * gradient / math.sqrt(sum(g * g for g in seen) / len(seen))
    torch.testing.assert_close(block.linear.s2.detach(), torch.full((3,), expected), rtol=1e-4, atol=0)


@pytest.mark.parametrize("names", [("beta", "gamma"), ("step", "s2", "s3"), ("s2", "s3")], ids="-".join)
def test_any_selection_of_parameters_is_trained(names: tuple[str, ...]):
    block = make_block(*names)
    stepper = started(block)
    collect(stepper, block)
    stepper.step()
    for name in names:
        lr = GRID_LR if name in GRID else WEIGHT_LR
        torch.testing.assert_close(getattr(block.linear, name), torch.full((3,), -lr), rtol=1e-4, atol=0)
    assert not block.linear.frozen.any()


def stepped(weights_of_losses: list[list[float]]) -> Tensor:
    """A parameter after steps that each add up the gradients of some losses."""
    block = make_block("s2")
    stepper = started(block)
    for factors in weights_of_losses:
        for factor in factors:
            collect(stepper, block, factor)
        stepper.step()
    return block.linear.s2.detach()


def test_gradients_add_up_until_the_step():
    torch.testing.assert_close(stepped([[5.0], [1.0, 2.0]]), stepped([[5.0], [3.0]]), rtol=1e-6, atol=0)


def test_gradients_are_cleared_by_the_step():
    assert not torch.allclose(stepped([[5.0], [3.0]]), stepped([[5.0], [8.0]]), rtol=1e-3, atol=0)
    block = make_block("s2")
    stepper = started(block)
    collect(stepper, block)
    stepper.step()
    assert block.linear.s2.grad is None or not block.linear.s2.grad.any()


@pytest.mark.parametrize("rests", [False, True])
def test_start_forgets_moments_and_schedule(rests: bool):
    block = make_block("beta", "s2")
    stepper = started(block)
    for _ in range(ITERATIONS - 1):
        collect(stepper, block, factor=-100.0)
        stepper.step()
    with torch.no_grad():
        block.linear.beta.zero_()
        block.linear.s2.zero_()
    if rests:
        stepper.release()
    stepper.start(ITERATIONS)
    collect(stepper, block)
    stepper.step()
    # Adam's very first step is its whole learning rate, against the gradient's sign.
    torch.testing.assert_close(block.linear.beta, torch.full((3,), -GRID_LR), rtol=1e-4, atol=0)
    torch.testing.assert_close(block.linear.s2, torch.full((3,), -WEIGHT_LR), rtol=1e-4, atol=0)


@pytest.mark.parametrize("optimizer", ["adam", "rms"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["beta", "s3"])
def test_from_a_gradient_that_is_not_finite_on_no_step_changes_anything(where: str, bad: float, optimizer: str):
    block = make_block("beta", "s2", "s3")
    stepper = started(block, replace(OPTIONS, optimizer=optimizer))
    collect(stepper, block)
    stepper.step()
    assert stepper.is_finite()
    before = {name: value.clone() for name, value in stepper.state().items()}
    collect(stepper, block)
    getattr(block.linear, where).grad[1] = bad
    stepper.step()
    assert not stepper.is_finite()
    for _ in range(2):
        collect(stepper, block)
        stepper.step()
    assert not stepper.is_finite()
    for name, value in stepper.state().items():
        assert torch.equal(value, before[name]), name
    stepper.start(ITERATIONS)
    assert stepper.is_finite()
    collect(stepper, block)
    stepper.step()
    assert not torch.equal(stepper.state()["0.value"], before["0.value"])


@pytest.mark.parametrize("optimizer", ["adam", "rms"])
def test_schedule_of_a_start_has_as_many_steps_as_it_was_given(optimizer: str):
    """On gradients that stay the same every step is the schedule's learning rate."""
    block = make_block("s2")
    stepper = started(block, replace(OPTIONS, optimizer=optimizer))
    for iterations in (2 * ITERATIONS, ITERATIONS):
        stepper.start(iterations)
        for done in range(iterations):
            before = block.linear.s2.detach().clone()
            collect(stepper, block)
            stepper.step()
            lr = WEIGHT_LR * (1 + math.cos(math.pi * done / iterations)) / 2
            torch.testing.assert_close(before - block.linear.s2.detach(), torch.full((3,), lr), rtol=1e-2, atol=1e-7)


def test_rate_of_the_start_holds_until_the_next():
    block = make_block("beta", "s2")
    stepper = started(block)
    moved = []
    for rate in (1.0, 0.25, 1.0):
        before = block.linear.s2.detach().clone()
        stepper.start(ITERATIONS, rate)
        collect(stepper, block)
        stepper.step()
        moved.append((before - block.linear.s2.detach()).mean().item())
    assert moved == pytest.approx([WEIGHT_LR, WEIGHT_LR / 4, WEIGHT_LR], rel=1e-3)


@pytest.mark.parametrize("optimizer", ["adam", "rms"])
@pytest.mark.parametrize("used", [False, True])
def test_stepper_that_takes_over_a_state_goes_on_as_the_one_that_gave_it(used: bool, optimizer: str):
    options = replace(OPTIONS, optimizer=optimizer)

    def steps(stepper: LocalStepper, block: nn.Module, factors: list[float]) -> None:
        for factor in factors:
            collect(stepper, block, factor)
            stepper.step()

    block, other = make_block("beta", "s2"), make_block("beta", "s2")
    first, second = started(block, options), started(other, options)
    steps(first, block, [1.0, -2.0, 3.0])
    saved = {name: value.clone() for name, value in first.state().items()}
    steps(first, block, [4.0, -1.0])
    if used:
        steps(second, other, [7.0, 7.0])
    second.start(ITERATIONS)
    second.restore(saved, 3)
    steps(second, other, [4.0, -1.0])
    assert first.state().keys() == second.state().keys()
    assert len(saved) == {"adam": 8, "rms": 6}[optimizer]
    for name, value in first.state().items():
        assert torch.equal(value, second.state()[name]), name
