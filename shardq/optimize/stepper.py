"""Steppers: they turn a loss into changed parameters. The training loop knows no ranks; its stepper does."""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn

from shardq.optimize.options import OptimizeOptions
from shardq.torch_internals import allow_fused_on_gpu

GRID_PARAMETERS = (".beta", ".gamma", ".step")


class Stepper(Protocol):
    """One optimizer over a block's trainable parameters, built once and started for each block."""

    def gathered(self, module: nn.Module, changed: bool = False) -> AbstractContextManager:
        """Have all parameters of a part of the quantizers on this rank during the body; every rank has to take part.

        Args:
            changed: the body writes to the parameters, the same values on every rank.
        """

    def start(self, iterations: int, rate: float = 1.0) -> None:
        """Forget the last block's moments and place in the schedule. The quantizers are at their start.

        Args:
            iterations: steps until the learning rates are 0.
            rate: factor of the learning rates.
        """

    def forward(self) -> list[Tensor]:
        """Fake-quantized weights of all quantizers, in order; differentiable."""

    def backward(self, collected: Tensor) -> None:
        """Propagate the gradient of this rank's loss from `BlockQuantizer.collected` to the parameters."""

    def step(self) -> None:
        """Change the parameters by the mean of the ranks' gradients, and clear it; a non-finite one changes nothing."""

    def is_finite(self) -> bool:
        """Whether all gradients since the start were finite; after one that was not, no step changes anything.

        The answer is the same on all ranks. Waits for the device.
        """

    def state(self) -> dict[str, Tensor]:
        """This rank's part of the parameters and the optimizer's moments, by name; no copies."""

    def restore(self, state: dict[str, Tensor], done: int) -> None:
        """After `start`: continue from what `state` returned after `done` steps on the same ranks."""

    def release(self) -> None:
        """End training until the next `start`: free what `start` can allocate again."""


OPTIMIZERS = {"adam": torch.optim.Adam, "rms": torch.optim.Adagrad}


class LocalStepper:
    """An optimizer with a cosine learning rate to 0, on one rank."""

    def __init__(self, module: nn.Module, options: OptimizeOptions):
        self._module, self._options = module, options
        self._groups, self._watched = parameter_groups(module, options), watched(module)
        self._done, self._iterations, self._rate = 0, 0, 1.0
        self._make()

    def _make(self) -> None:
        self._optimizer = make_optimizer(self._options.optimizer, self._groups)
        self._not_finite = skipped_where(self._optimizer, self._watched[0].device)

    def start(self, iterations: int, rate: float = 1.0) -> None:
        """Zero the optimizer's state, in place where it exists, and go to the start of the schedule."""
        if self._optimizer is None:
            self._make()
        for state in self._optimizer.state.values():
            for value in state.values():
                value.zero_()
        self._done, self._iterations, self._rate = 0, iterations, rate
        self._not_finite.zero_()

    def gathered(self, module: nn.Module, changed: bool = False) -> AbstractContextManager:
        return nullcontext()

    def forward(self) -> list[Tensor]:
        return self._module()

    def backward(self, collected: Tensor) -> None:
        collected.backward()

    def step(self) -> None:
        self._not_finite.masked_fill_(~self._gradient_norm().isfinite(), 1.0)
        set_learning_rates(self._optimizer, self._done, self._iterations, self._rate)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._done += 1

    def release(self) -> None:
        """Free the moments."""
        self._optimizer = None

    def is_finite(self) -> bool:
        return not self._not_finite.item()

    def state(self) -> dict[str, Tensor]:
        return dict(state_of(self._optimizer, self._parameters()))

    def restore(self, state: dict[str, Tensor], done: int) -> None:
        take_over(self._optimizer, self._parameters(), state)
        self._done = done

    def _gradient_norm(self) -> Tensor:
        """Norm of all gradients; not finite if one of them is not."""
        return nn.utils.get_total_norm([parameter.grad for parameter in self._watched])

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self._optimizer.param_groups for parameter in group["params"]]


def make_optimizer(kind: str, groups: list[dict]) -> torch.optim.Optimizer:
    """One of `OptimizeOptions.optimizer` over parameters in groups, fused."""
    optimizer = OPTIMIZERS[kind](groups, fused=True)
    if kind == "rms":
        allow_fused_on_gpu(optimizer)
    return optimizer


def set_learning_rates(optimizer: torch.optim.Optimizer, done: int, iterations: int, rate: float = 1.0) -> None:
    """Set the learning rates of the step after `done` of `iterations`, for the groups of `parameter_groups`.

    Args:
        rate: factor of all learning rates.
    """
    factor = rate * cosine_factor(done, iterations)
    if isinstance(optimizer, torch.optim.Adagrad):  # `rms` divides by the root of the mean square, Adagrad of the sum
        factor *= math.sqrt(done + 1)
    for group in optimizer.param_groups:
        group["lr"] = group["start_lr"] * factor


def skipped_where(optimizer: torch.optim.Optimizer, device: torch.device) -> Tensor:
    """A flag for a fused optimizer: while it is 1, a step changes nothing; the host need not read its value."""
    optimizer.found_inf = torch.zeros((), device=device)  # the attribute that torch.amp.GradScaler sets
    return optimizer.found_inf


def state_of(optimizer: torch.optim.Optimizer, parameters: list[Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Parameters of an optimizer and its state for each, with names; plain numbers as tensors of int64."""
    for number, parameter in enumerate(parameters):
        yield f"{number}.value", parameter.detach()
        for name, value in optimizer.state.get(parameter, {}).items():
            yield f"{number}.{name}", value if isinstance(value, Tensor) else torch.tensor(value)


@torch.no_grad()
def take_over(optimizer: torch.optim.Optimizer, parameters: list[Tensor], state: dict[str, Tensor]) -> None:
    """Load what `state_of` gave, in place where the tensors exist."""
    for number, parameter in enumerate(parameters):
        prefix, kept = f"{number}.", optimizer.state[parameter]
        saved = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        parameter.copy_(saved.pop("value"))
        for name, value in saved.items():
            if name in kept:
                kept[name].copy_(value)
            else:
                kept[name] = value.item() if value.dtype == torch.int64 else value.to(parameter.device)


def cosine_factor(done: int, iterations: int) -> float:
    """Factor of the learning rates after `done` steps: `(1 + cos(pi * done / iterations)) / 2`."""
    return 0.5 * (1 + math.cos(math.pi * done / iterations))


def parameter_groups(module: nn.Module, options: OptimizeOptions) -> list[dict]:
    """An optimizer's groups: the grids' parameters and the weights', each with its learning rate at the start."""
    grid, weight = trainable(module)
    groups = [{"params": grid, "start_lr": options.grid_lr}, {"params": weight, "start_lr": options.weight_lr}]
    return [group for group in groups if group["params"]]


def trainable(module: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The trainable parameters of quantizers: those of the grids, those of the weights."""
    named = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    grid = [parameter for name, parameter in named if name.endswith(GRID_PARAMETERS)]
    return grid, [parameter for name, parameter in named if not name.endswith(GRID_PARAMETERS)]


def watched(module: nn.Module) -> list[nn.Parameter]:
    """Trainable parameters whose gradients show whether all are finite; s3's stand for s2's, whose sums they are."""
    named = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    summed = {name.removesuffix("3") + "2" for name in named if name.endswith(".s3")}
    return [parameter for name, parameter in named.items() if name not in summed]
