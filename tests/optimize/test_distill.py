"""Blockwise distillation against a training loop written out in plain autograd."""

import copy

import pytest
import torch
from torch import Tensor, nn

from shardq.optimize.attach import attach
from shardq.optimize.distill import distill
from shardq.optimize.linear import Method
from shardq.optimize.options import OptimizeOptions
from shardq.optimize.stepper import LocalStepper
from shardq.quant.spec import QuantSpec

METHODS = ("adascale", "flexround", "lwc")
STEPS, GRID_LR, WEIGHT_LR = 20, 5e-3, 2e-3
SPECS = [
    QuantSpec(bits=bits, symmetric=symmetric, group_size=group_size)
    for bits, symmetric, group_size in ((2, True, None), (3, True, None), (3, False, 8), (4, True, 8), (4, False, None))
]

Parameters = dict[str, Tensor]


def make_block() -> nn.Sequential:
    """Two linears with a nonlinearity between them."""
    return nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16)).requires_grad_(False)


def make_batches(block: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Inputs [2, 10, 16] with the unquantized block's outputs on slightly different ones as targets."""
    inputs = torch.randn(STEPS, 2, 10, 16)
    return [(some, block(some + 0.05 * torch.randn_like(some))) for some in inputs]


def round_through(values: Tensor) -> Tensor:
    """Rounding that passes the gradient on."""
    return values + (values.round() - values).detach()


class NaiveLinear:
    """One fake-quantized linear as the papers write it, with autograd doing all the work."""

    def __init__(self, linear: nn.Linear, spec: QuantSpec, method: Method):
        self.linear, self.spec = linear, spec
        self.rows = linear.weight.reshape(-1, spec.group_size or linear.in_features)
        low = self.rows.min(1, keepdim=True).values.clamp(max=0)
        high = self.rows.max(1, keepdim=True).values.clamp(min=0)
        if spec.symmetric:
            step = torch.maximum(high / (2 if spec.bits == 2 else spec.qmax), low / spec.qmin)
            low, high = spec.qmin * step, spec.qmax * step
        self.low, self.high = low, high
        shapes = {"beta": low, "gamma": low, "step": low, "s2": self.rows, "s3": low}
        self.trained = {
            "adascale": ("beta", "gamma", "s2", "s3"), "flexround": ("step", "s2", "s3"), "lwc": ("beta", "gamma"),
        }[method]  # fmt: skip
        self.parameters = {
            name: torch.zeros_like(like, requires_grad=name in self.trained) for name, like in shapes.items()
        }

    def __call__(self, inputs: Tensor) -> Tensor:
        spec, p = self.spec, self.parameters
        low = (p["beta"] + p["step"]).exp() * self.low
        high = (p["gamma"] + p["step"]).exp() * self.high
        scale = (high - low) / (2**spec.bits - 1)
        zero = 0.0 if spec.symmetric else round_through((spec.qmin - low / scale).clamp(spec.qmin, spec.qmax))
        divided = self.rows / p["s2"].exp() / p["s3"].exp()
        codes = (round_through(divided / scale) + zero).clamp(spec.qmin, spec.qmax)
        weight = ((codes - zero) * scale).reshape(self.linear.weight.shape)
        return nn.functional.linear(inputs, weight, self.linear.bias)


def train_naively(block: nn.Sequential, batches: list, spec: QuantSpec, method: Method) -> dict[str, Parameters]:
    """The reference loop; trained parameters by the name of their linear."""
    first, last = NaiveLinear(block[0], spec, method), NaiveLinear(block[2], spec, method)
    named = [(name, linear.parameters[name]) for linear in (first, last) for name in linear.trained]
    grid = [parameter for name, parameter in named if name in ("beta", "gamma", "step")]
    weight = [parameter for name, parameter in named if name in ("s2", "s3")]
    groups = [{"params": grid, "lr": GRID_LR}, {"params": weight, "lr": WEIGHT_LR}]
    optimizer = torch.optim.Adam([group for group in groups if group["params"]], foreach=False, fused=False)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=STEPS, eta_min=0)
    for inputs, targets in batches:
        optimizer.zero_grad()
        ((last(block[1](first(inputs))) - targets) ** 2).sum(dim=1).mean().backward()
        optimizer.step()
        schedule.step()
    return {"0": trained_of(first), "2": trained_of(last)}


def trained_of(linear: NaiveLinear) -> Parameters:
    """Trained parameters of one naive linear."""
    return {name: linear.parameters[name].detach() for name in linear.trained}


def train_with_distill(block: nn.Sequential, batches: list, spec: QuantSpec, method: Method) -> dict[str, Parameters]:
    """What is tested; trained parameters by the name of their linear."""
    attach(block, ["0", "2"], spec, method)
    options = OptimizeOptions(iterations=STEPS, grid_lr=GRID_LR, weight_lr=WEIGHT_LR)
    distill(block, LocalStepper(block, options), batches, on_step=lambda: None)
    return {name: {key: value.detach() for key, value in block[int(name)].named_parameters()} for name in ("0", "2")}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_training_gives_the_parameters_of_the_naive_loop(spec: QuantSpec, method: Method):
    block = make_block()
    batches = make_batches(block)
    expected = train_naively(copy.deepcopy(block), batches, spec, method)
    trained = train_with_distill(block, batches, spec, method)
    for linear in expected:
        assert trained[linear].keys() == expected[linear].keys()
        for name, parameter in expected[linear].items():
            assert parameter.abs().max() > WEIGHT_LR, f"{name} has hardly moved, so nothing is compared"
            torch.testing.assert_close(trained[linear][name], parameter, rtol=1e-3, atol=1e-5, msg=f"{linear}.{name}")


@pytest.mark.parametrize("method", METHODS)
def test_training_brings_the_output_nearer_to_the_target(method: Method):
    block = make_block()
    inputs = torch.randn(4, 32, 16)
    targets = block(inputs)
    attach(block, ["0", "2"], QuantSpec(bits=2), method)
    before = (block(inputs) - targets).square().mean().item()
    options = OptimizeOptions(iterations=100, grid_lr=5e-3, weight_lr=5e-3)
    distill(block, LocalStepper(block, options), [(inputs, targets)] * 100, on_step=lambda: None)
    assert (block(inputs) - targets).square().mean().item() < 0.8 * before


def test_every_batch_is_one_step_and_is_reported_after_it():
    block = make_block()
    batches = make_batches(block)[:3]
    attach(block, ["0"], QuantSpec(bits=4), "lwc")
    seen = []
    options = OptimizeOptions(iterations=3, grid_lr=GRID_LR, weight_lr=WEIGHT_LR)
    distill(block, LocalStepper(block, options), iter(batches), lambda: seen.append(block[0].beta[0].item()))
    assert len(seen) == len(set(seen)) == 3 and 0.0 not in seen


def test_frozen_tensors_are_left_alone():
    block = make_block()
    batches = make_batches(block)
    kept = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    train_with_distill(block, batches, QuantSpec(bits=4), "adascale")
    assert torch.equal(block[0].rows, kept["0.weight"]) and torch.equal(block[2].rows, kept["2.weight"])
    assert torch.equal(block[0].bias, kept["0.bias"]) and torch.equal(block[2].bias, kept["2.bias"])
