"""What turns a loss into changed parameters. The training loop knows only this; ranks are the stepper's business."""

import math
from typing import Protocol

import torch
from torch import Tensor, nn

from shardq.optimize.options import OptimizeOptions

GRID_PARAMETERS = (".beta", ".gamma", ".step")


class Stepper(Protocol):
    """One optimizer over a block's trainable parameters."""

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of this rank's mean loss."""

    def step(self) -> None:
        """Change the parameters by the gradient of the mean over ranks, and clear it."""


class LocalStepper:
    """Adam with a cosine learning rate to 0, on one rank."""

    def __init__(self, block: nn.Module, options: OptimizeOptions):
        grid, weight = trainable(block)
        groups = [{"params": grid, "lr": options.grid_lr}, {"params": weight, "lr": options.weight_lr}]
        self._optimizer = torch.optim.Adam([group for group in groups if group["params"]], fused=True)
        self._start_lrs = [group["lr"] for group in self._optimizer.param_groups]
        self._iterations, self._done = options.iterations, 0

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient."""
        loss.backward()

    def step(self) -> None:
        """Adam step at the current learning rate, `lr * (1 + cos(pi * step / iterations)) / 2`."""
        # By hand: torch's schedulers and the optimizer refer to each other, which would keep a block's state alive
        # until the garbage collector runs.
        factor = 0.5 * (1 + math.cos(math.pi * self._done / self._iterations))
        for group, start_lr in zip(self._optimizer.param_groups, self._start_lrs, strict=True):
            group["lr"] = start_lr * factor
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._done += 1


def trainable(block: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """A block's trainable parameters: those of the grids, those of the weights."""
    named = [(name, parameter) for name, parameter in block.named_parameters() if parameter.requires_grad]
    grid = [parameter for name, parameter in named if name.endswith(GRID_PARAMETERS)]
    return grid, [parameter for name, parameter in named if not name.endswith(GRID_PARAMETERS)]
