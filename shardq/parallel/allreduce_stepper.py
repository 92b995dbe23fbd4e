"""Data-parallel stepper: every rank holds the whole state and steps by the mean gradient."""

from contextlib import AbstractContextManager

from torch import Tensor, nn

from shardq.optimize.options import OptimizeOptions
from shardq.optimize.stepper import LocalStepper, trainable
from shardq.parallel.collectives import average_gradients
from shardq.parallel.ranks import Ranks


class AllReduceStepper:
    """A LocalStepper whose gradients are averaged over ranks first; equal parameters stay equal."""

    def __init__(self, module: nn.Module, options: OptimizeOptions, ranks: Ranks):
        self._local = LocalStepper(module, options)
        self._parameters = [parameter for group in trainable(module) for parameter in group]
        self._ranks = ranks

    def start(self) -> None:
        """Start the optimizer anew."""
        self._local.start()

    def gathered(self, module: nn.Module, changed: bool = False) -> AbstractContextManager:
        """Nothing to do: they are whole."""
        return self._local.gathered(module, changed)

    def forward(self) -> list[Tensor]:
        """The quantizers' own forward."""
        return self._local.forward()

    def backward(self, tensors: list[Tensor], gradients: list[Tensor]) -> None:
        """Accumulate this rank's gradient."""
        self._local.backward(tensors, gradients)

    def step(self) -> None:
        """Average the gradients over ranks and step."""
        average_gradients(self._ranks, [parameter.grad for parameter in self._parameters])
        self._local.step()
