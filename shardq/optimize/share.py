"""What of a linear's quantizer this process holds: which output channels it quantizes, and how they become whole."""

from collections.abc import Callable, Iterable
from typing import Protocol, TypeVar

from torch import Tensor

from shardq.optimize.linear_quantizer import LinearQuantizer

Result = TypeVar("Result")


class Share(Protocol):
    """The part of every linear's outputs that a rank quantizes; what is joined is whole, and equal, on every rank."""

    def outputs(self, num_outputs: int) -> slice:
        """The rank's outputs of a linear with so many."""

    def made(self, quantizer: LinearQuantizer) -> None:
        """Called with each quantizer once it has been allocated, before the next is: it may be sharded from here on."""

    def joined(self, parts: Iterable[Tensor], num_outputs: Iterable[int]) -> list[Tensor]:
        """Tensors [O, ...] from every rank's parts of them; differentiable: a part gets the mean of ranks' gradients.

        Args:
            num_outputs: O of each tensor.
        """

    def agreed(self, work: Callable[[], Result]) -> Result:
        """Run `work`, which is without collectives; if it fails on any rank, every rank raises the error."""


class Everything:
    """The share of a rank that quantizes all linears by itself."""

    def outputs(self, num_outputs: int) -> slice:
        """All of them."""
        return slice(num_outputs)

    def made(self, quantizer: LinearQuantizer) -> None:
        """It stays whole."""

    def joined(self, parts: Iterable[Tensor], num_outputs: Iterable[int]) -> list[Tensor]:
        """The parts themselves."""
        return list(parts)

    def agreed(self, work: Callable[[], Result]) -> Result:
        """Nobody else has to agree."""
        return work()
