"""Data-parallel stepper: every rank holds the whole state and steps by the mean gradient."""

from torch import Tensor, nn

from shardq.optimize.options import OptimizeOptions
from shardq.optimize.stepper import LocalStepper, trainable
from shardq.parallel.collectives import average_gradients
from shardq.parallel.ranks import Ranks


class AllReduceStepper:
    """A LocalStepper whose gradients are averaged over ranks first; equal parameters stay equal."""

    def __init__(self, block: nn.Module, options: OptimizeOptions, ranks: Ranks):
        self._local = LocalStepper(block, options)
        self._parameters = [parameter for group in trainable(block) for parameter in group]
        self._ranks = ranks

    def backward(self, loss: Tensor) -> None:
        """Accumulate this rank's gradient."""
        self._local.backward(loss)

    def step(self) -> None:
        """Average the gradients over ranks and step."""
        average_gradients(self._ranks, [parameter.grad for parameter in self._parameters])
        self._local.step()
