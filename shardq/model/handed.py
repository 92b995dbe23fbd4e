"""What blocks leave for later ones besides hidden states: tensors in a mapping that all share, and returned values."""

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from shardq.torch_internals import tree_leaves


@dataclass(frozen=True)
class Shared:
    """A mapping that blocks pass on: its place among a call's leaves, its type, and its tensors at this block.

    Attributes:
        entering, leaving: key and place of each tensor in it before and after the block.
        is_tuple: whether a key's value is a tuple of tensors.
    """

    place: int
    kind: type
    entering: tuple[tuple[str, int], ...]
    leaving: tuple[tuple[str, int], ...]
    is_tuple: dict[str, bool]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of its tensors before the block."""
        return tuple(f"{key}{place}" for key, place in self.entering)

    def mapping(self, carried: Sequence[Tensor]) -> MutableMapping:
        """The mapping as it enters a block."""
        values: dict[str, list[Tensor]] = {}
        for (key, _), tensor in zip(self.entering, carried, strict=True):
            values.setdefault(key, []).append(tensor)
        filled = self.kind()
        for key, tensors in values.items():
            filled[key] = tuple(tensors) if self.is_tuple[key] else tensors[0]
        return filled

    def left_in(self, mapping: MutableMapping) -> tuple[Tensor, ...]:
        """The tensors in the mapping after the block, in the order of `leaving`."""
        return tuple(mapping[key][place] if self.is_tuple[key] else mapping[key] for key, place in self.leaving)


class Handed(NamedTuple):
    """A tensor among what a block returns that later blocks are passed.

    Attributes:
        block: the block that returns it.
        leaf: its place among the leaves of what the block returns.
        dim: dimension of the samples.
        until: the last block that is passed it.
    """

    block: int
    leaf: int
    dim: int
    until: int

    @property
    def name(self) -> str:
        """The name under which it is kept."""
        return f"returned{self.block}.{self.leaf}"

    def of(self, returned: object, num: int) -> Tensor:
        """The tensor in what its block returned for N samples, [N, K, ...]: K rows of the batch dimension each."""
        return tree_leaves(returned)[self.leaf].movedim(self.dim, 0).unflatten(0, (num, -1))
