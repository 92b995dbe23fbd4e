"""What turns a loss into changed parameters. The training loop knows only this; ranks are the stepper's business."""

import math
from typing import Protocol

import torch
from torch import Tensor, nn

from shardq.optimize.options import OptimizeOptions

GRID_PARAMETERS = (".beta", ".gamma", ".step")


class Stepper(Protocol):
    """One optimizer over a block's trainable parameters, built once and started anew for each block."""

    def start(self) -> None:
        """Forget what the last block left: moments and the place in the schedule."""

    def backward(self, tensors: list[Tensor], gradients: list[Tensor]) -> None:
        """Take the gradient of this rank's loss from `tensors` on to the parameters they were computed from."""

    def step(self) -> None:
        """Change the parameters by the mean of the ranks' gradients, and clear it."""


class LocalStepper:
    """Adam, or descent by the gradient's sign, with a cosine learning rate to 0, on one rank."""

    def __init__(self, module: nn.Module, options: OptimizeOptions):
        grid, weight = trainable(module)
        groups = [{"params": grid, "lr": options.grid_lr}, {"params": weight, "lr": options.weight_lr}]
        groups = [group for group in groups if group["params"]]
        self._by_sign = options.optimizer == "sign"
        self._optimizer = (torch.optim.SGD if self._by_sign else torch.optim.Adam)(groups, fused=True)
        self._start_lrs = [group["lr"] for group in self._optimizer.param_groups]
        self._iterations, self._done = options.iterations, 0

    def start(self) -> None:
        """Zero the optimizer's moments and step counts in place, and go to the start of the schedule."""
        for state in self._optimizer.state.values():
            for value in state.values():
                value.zero_()
        self._done = 0

    def backward(self, tensors: list[Tensor], gradients: list[Tensor]) -> None:
        """Accumulate the gradient."""
        torch.autograd.backward(tensors, gradients)

    def step(self) -> None:
        """One step at the current learning rate, `lr * (1 + cos(pi * step / iterations)) / 2`."""
        factor = 0.5 * (1 + math.cos(math.pi * self._done / self._iterations))
        for group, start_lr in zip(self._optimizer.param_groups, self._start_lrs, strict=True):
            group["lr"] = start_lr * factor
            if self._by_sign:
                torch._foreach_sign_([parameter.grad for parameter in group["params"]])
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._done += 1


def trainable(module: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The trainable parameters of quantizers: those of the grids, those of the weights."""
    named = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    grid = [parameter for name, parameter in named if name.endswith(GRID_PARAMETERS)]
    return grid, [parameter for name, parameter in named if not name.endswith(GRID_PARAMETERS)]
