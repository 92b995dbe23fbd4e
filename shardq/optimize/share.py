"""The part of each linear that this process quantizes: which output channels, and how all ranks' parts are joined."""

from collections.abc import Callable, Iterable
from typing import Protocol, TypeVar

from torch import Tensor

from shardq.optimize.linear_quantizer import LinearQuantizer

Result = TypeVar("Result")


class Share(Protocol):
    """The part of every linear's outputs that a rank quantizes; joined tensors are complete and equal on every rank."""

    def outputs(self, num_outputs: int) -> slice:
        """The rank's outputs of a linear that has `num_outputs`."""

    def made(self, quantizer: LinearQuantizer) -> None:
        """Take note of a quantizer that has been allocated, before the next is: the share may shard it from here on."""

    def joined(self, parts: Iterable[Tensor], num_outputs: Iterable[int]) -> list[Tensor]:
        """Join every rank's parts into tensors [O, ...]; differentiable: a part gets the mean of the ranks' gradients.

        Args:
            num_outputs: O of each tensor.
        """

    def agreed(self, work: Callable[[], Result]) -> Result:
        """Run `work`, which calls no collective; if it fails on any rank, every rank raises the error."""


class Everything:
    """The share of a rank that quantizes all linears by itself."""

    def outputs(self, num_outputs: int) -> slice:
        return slice(num_outputs)

    def made(self, quantizer: LinearQuantizer) -> None:
        """Do nothing: the quantizer is not sharded."""

    def joined(self, parts: Iterable[Tensor], num_outputs: Iterable[int]) -> list[Tensor]:
        return list(parts)

    def agreed(self, work: Callable[[], Result]) -> Result:
        return work()
