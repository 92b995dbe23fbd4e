"""What turns a loss into changed parameters. The training loop knows only this; ranks are the stepper's business."""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn

from shardq.optimize.options import OptimizeOptions

GRID_PARAMETERS = (".beta", ".gamma", ".step")


class Stepper(Protocol):
    """One optimizer over a block's trainable parameters, built once and started anew for each block."""

    def gathered(self, module: nn.Module, changed: bool = False) -> AbstractContextManager:
        """Have the parameters of some of the quantizers whole while the body runs; every rank has to take part.

        Args:
            changed: the body writes to them, the same on every rank.
        """

    def start(self) -> None:
        """Forget what the last block left: moments and the place in the schedule. The quantizers are at their start."""

    def forward(self) -> list[Tensor]:
        """Fake-quantized weights of all quantizers, in order; differentiable."""

    def backward(self, collected: Tensor) -> None:
        """Take the gradient of this rank's loss from `BlockQuantizer.collected` on to the parameters."""

    def step(self) -> None:
        """Change the parameters by the mean of the ranks' gradients, and clear it."""

    def rest(self) -> None:
        """Training is over until the next start: let go of what that can make anew."""


class LocalStepper:
    """Adam, or descent by the gradient's sign, with a cosine learning rate to 0, on one rank."""

    def __init__(self, module: nn.Module, options: OptimizeOptions):
        self._module, self._by_sign = module, options.optimizer == "sign"
        optimizer = torch.optim.SGD if self._by_sign else torch.optim.Adam
        self._optimizer = optimizer(parameter_groups(module, options), fused=True)
        self._start_lrs = [group["lr"] for group in self._optimizer.param_groups]
        self._iterations, self._done = options.iterations, 0

    def start(self) -> None:
        """Zero the optimizer's moments and step counts in place, and go to the start of the schedule."""
        for state in self._optimizer.state.values():
            for value in state.values():
                value.zero_()
        self._done = 0

    def gathered(self, module: nn.Module, changed: bool = False) -> AbstractContextManager:
        """Nothing to do: they are whole."""
        return nullcontext()

    def forward(self) -> list[Tensor]:
        """The quantizers' own forward."""
        return self._module()

    def backward(self, collected: Tensor) -> None:
        """Accumulate the gradient."""
        collected.backward()

    def step(self) -> None:
        """One step at the schedule's learning rate."""
        factor = cosine_factor(self._done, self._iterations)
        for group, start_lr in zip(self._optimizer.param_groups, self._start_lrs, strict=True):
            group["lr"] = start_lr * factor
            if self._by_sign:
                torch._foreach_sign_([parameter.grad for parameter in group["params"]])
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._done += 1

    def rest(self) -> None:
        """Let go of the moments."""
        self._optimizer.state.clear()


def cosine_factor(done: int, iterations: int) -> float:
    """What the learning rates are multiplied by after `done` steps: `(1 + cos(pi * done / iterations)) / 2`."""
    return 0.5 * (1 + math.cos(math.pi * done / iterations))


def parameter_groups(module: nn.Module, options: OptimizeOptions) -> list[dict]:
    """An optimizer's groups: the grids' parameters and the weights', each with its learning rate."""
    grid, weight = trainable(module)
    groups = [{"params": grid, "lr": options.grid_lr}, {"params": weight, "lr": options.weight_lr}]
    return [group for group in groups if group["params"]]


def trainable(module: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The trainable parameters of quantizers: those of the grids, those of the weights."""
    named = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    grid = [parameter for name, parameter in named if name.endswith(GRID_PARAMETERS)]
    return grid, [parameter for name, parameter in named if not name.endswith(GRID_PARAMETERS)]
