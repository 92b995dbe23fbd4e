"""Arguments of a decoder block other than the hidden states: the same for all samples, or one for each sample."""

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from shardq.model.skeleton import to_meta
from shardq.torch_internals import tree_flatten, tree_unflatten


class Call(NamedTuple):
    """One call of a block by the model: hidden states [N, T, D], then its other arguments."""

    hidden: Tensor
    args: tuple
    kwargs: dict


@dataclass(frozen=True)
class Entering:
    """The input of a block for some samples, where that is more than hidden states.

    Attributes:
        hidden: hidden states [N, T, D].
        own: arguments that follow the sample, [N, K, ...]: K rows of the argument's batch dimension each.
        carried: tensors that earlier blocks have left for later ones, [N, ...].
    """

    hidden: Tensor
    own: tuple[Tensor, ...] = ()
    carried: tuple[Tensor, ...] = ()

    def __len__(self) -> int:
        return len(self.hidden)

    def __getitem__(self, some: slice) -> "Entering":
        own, carried = (tuple(values[some] for values in kept) for kept in (self.own, self.carried))
        return Entering(self.hidden[some], own, carried)

    @property
    def device(self) -> torch.device:
        """The device of the tensors."""
        return self.hidden.device


def hidden_of(entering: Tensor | Entering) -> Tensor:
    """The hidden states [N, T, D] of a block's input or output."""
    return entering.hidden if isinstance(entering, Entering) else entering


def with_hidden(entering: Tensor | Entering, hidden_NTD: Tensor) -> Tensor | Entering:
    """A block's input, with other hidden states."""
    return replace(entering, hidden=hidden_NTD) if isinstance(entering, Entering) else hidden_NTD


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


@dataclass(frozen=True)
class BlockArguments:
    """Arguments of a block other than the hidden states: masks, position embeddings, position ids, ...

    Attributes:
        args, kwargs: the arguments of a call with one sequence.
        width: channels of the hidden states that enter the block.
        own: places, among the arguments' leaves, of tensors that follow the sample, and their batch dimension.
        repeated: places of tensors that are the same for any sample but grow with the batch, and the dimension.
        rows: places of the repeated tensors that the block broadcasts from one row.
        shared: the mapping that blocks pass on, if there is one.
        example: the block's input for one sample without the hidden states, on the meta device.
    """

    args: tuple
    kwargs: dict
    width: int
    own: tuple[tuple[int, int], ...] = ()
    repeated: tuple[tuple[int, int], ...] = ()
    rows: tuple[tuple[int, int], ...] = ()
    shared: Shared | None = None
    example: Entering | None = None

    @property
    def is_fixed(self) -> bool:
        """Whether the same objects are passed for any samples."""
        return not (self.own or self.repeated or self.shared)

    @property
    def own_names(self) -> tuple[str, ...]:
        """Names under which a sample's own arguments are kept."""
        return tuple(f"own{place}" for place, _ in self.own)

    @property
    def carried_names(self) -> tuple[str, ...]:
        """Names under which the tensors that earlier blocks have left for this block are kept."""
        return tuple(f"{key}{place}" for key, place in self.shared.entering) if self.shared else ()

    @property
    def own_bytes(self) -> int:
        """Bytes of a sample's own arguments."""
        return sum(values.nbytes for values in self.example.own) if self.example else 0

    @property
    def carried_bytes(self) -> int:
        """Bytes of a sample's tensors that earlier blocks have left for this block."""
        return sum(values.nbytes for values in self.example.carried) if self.example else 0

    def own_of(self, call: Call) -> tuple[Tensor, ...]:
        """The arguments that follow the sample, from the model's call with N sequences, [N, K, ...] each."""
        leaves, num = tree_flatten((call.args, call.kwargs))[0], len(call.hidden)
        return tuple(leaves[place].movedim(dim, 0).unflatten(0, (num, -1)) for place, dim in self.own)

    def entering(self, left: Tensor | Entering, own: tuple[Tensor, ...]) -> Tensor | Entering:
        """The block's input: the output of the block before it, and this block's own arguments."""
        carried = left.carried if isinstance(left, Entering) else ()
        return Entering(hidden_of(left), own, carried) if own or carried else hidden_of(left)

    def bound(self, entering: Tensor | Entering) -> Call:
        """The call of the block with its input."""
        if self.is_fixed:
            return Call(hidden_of(entering), self.args, self.kwargs)
        given = entering if isinstance(entering, Entering) else Entering(entering)
        leaves, structure = tree_flatten((self.args, self.kwargs))
        for (place, dim), values in zip(self.own, given.own, strict=True):
            leaves[place] = values.flatten(0, 1).movedim(0, dim)
        for place, dim in self.repeated:
            leaves[place] = torch.cat([leaves[place]] * len(given), dim)
        if self.shared:
            leaves[self.shared.place] = self.shared.mapping(given.carried)
        return Call(given.hidden, *tree_unflatten(leaves, structure))

    def leaving(self, hidden_NTD: Tensor, call: Call) -> Tensor | Entering:
        """The block's output after a call that gave hidden states; the next block's own arguments are not in it."""
        if self.shared is None or not self.shared.leaving:
            return hidden_NTD
        return Entering(hidden_NTD, carried=self.shared.left_in(self.shared_in(call)))

    def shared_in(self, call: Call) -> MutableMapping:
        """The mapping that blocks pass on, in a call."""
        return tree_flatten((call.args, call.kwargs))[0][self.shared.place]

    def on_meta(self, hidden_shape: tuple[int, int, int]) -> Call:
        """The call for hidden states [N, T, D] on the meta device, where nothing is computed."""
        num, hidden = hidden_shape[0], torch.empty(hidden_shape, device="meta")
        if self.is_fixed:
            return Call(*to_meta(self.bound(hidden)))
        own, carried = (
            tuple(values.expand(num, *values.shape[1:]) for values in kept)
            for kept in (self.example.own, self.example.carried)
        )
        return Call(*to_meta(self.bound(Entering(hidden, own, carried))))
