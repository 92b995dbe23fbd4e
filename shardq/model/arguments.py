"""Arguments of a decoder block other than the hidden states: the same for all samples, or one for each sample."""

from collections.abc import MutableMapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from shardq.model.handed import Handed, Shared
from shardq.model.hidden import Lanes, hidden_in
from shardq.model.stand_in import to_meta
from shardq.torch_internals import tree_flatten, tree_leaves, tree_unflatten


class Call(NamedTuple):
    """One call of a block by the model: hidden states in the model's own form, then the other arguments."""

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


class Own(NamedTuple):
    """An argument that follows the sample.

    Attributes:
        place: its place among the arguments' leaves.
        dim: dimension of the samples.
        block: the first block that is passed the same tensor; it is kept once, with that block.
        name: the name under which it is kept.
    """

    place: int
    dim: int
    block: int
    name: str


@dataclass(frozen=True)
class BlockArguments:
    """Arguments of a block other than the hidden states: masks, position embeddings, position ids, ...

    Attributes:
        index: the block's place in the model.
        args, kwargs: the arguments of a call with one sequence.
        width: channels of the hidden states [N, T, D] that enter the block, all lanes together.
        lanes: where the lanes are in the model's hidden states; None for plain ones.
        own: arguments that follow the sample.
        repeated: places, among the arguments' leaves, of tensors that are the same for any sample but grow with the
            batch, and the dimension.
        rows: places of the repeated tensors that the block broadcasts from one row.
        shared: the mapping that blocks pass on, if there is one.
        handed: tensors that earlier blocks have returned and that this block or later ones are passed.
        received: places among the arguments' leaves of handed tensors.
        returned: tensors that this block returns and later blocks are passed.
        example: the block's input for one sample without the hidden states, on the meta device.
    """

    index: int
    args: tuple
    kwargs: dict
    width: int
    lanes: Lanes | None = None
    own: tuple[Own, ...] = ()
    repeated: tuple[tuple[int, int], ...] = ()
    rows: tuple[tuple[int, int], ...] = ()
    shared: Shared | None = None
    handed: tuple[Handed, ...] = ()
    received: tuple[tuple[int, Handed], ...] = ()
    returned: tuple[Handed, ...] = ()
    example: Entering | None = None

    @property
    def is_fixed(self) -> bool:
        """Whether the same objects are passed for any samples, and nothing but hidden states leaves."""
        return not (self.lanes or self.own or self.repeated or self.shared or self.handed or self.returned)

    @property
    def carried_names(self) -> tuple[str, ...]:
        """Names under which the tensors that earlier blocks have left for this and later ones are kept."""
        return (*(self.shared.names if self.shared else ()), *(tensor.name for tensor in self.handed))

    @property
    def own_bytes(self) -> dict[tuple[int, str], int]:
        """Bytes of a sample's own arguments, by the block with which each is kept and its name."""
        own = () if self.example is None else self.example.own
        return {(kept.block, kept.name): values.nbytes for kept, values in zip(self.own, own, strict=True)}

    @property
    def carried_bytes(self) -> int:
        """Bytes of a sample's tensors that earlier blocks have left for this block."""
        carried = () if self.example is None else self.example.carried
        return sum(values.nbytes for values in carried)

    def own_of(self, call: Call) -> tuple[Tensor, ...]:
        """The arguments that follow the sample, from the model's call with some samples, [N, K, ...] each."""
        leaves, num = tree_leaves((call.args, call.kwargs)), self.num_samples(call)
        return tuple(leaves[own.place].movedim(own.dim, 0).unflatten(0, (num, -1)) for own in self.own)

    def num_samples(self, call: Call) -> int:
        """Number of samples of a call."""
        return call.hidden.shape[self.lanes.dim if self.lanes else 0]

    def flat(self, hidden: Tensor) -> Tensor:
        """The model's hidden states as [N, T, D]."""
        return self.lanes.flat(hidden) if self.lanes else hidden

    def spread(self, hidden_NTD: Tensor) -> Tensor:
        """Hidden states [N, T, D] as the model has them."""
        return self.lanes.spread(hidden_NTD) if self.lanes else hidden_NTD

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
        for own, values in zip(self.own, given.own, strict=True):
            leaves[own.place] = values.flatten(0, 1).movedim(0, own.dim)
        for place, dim in self.repeated:
            leaves[place] = torch.cat([leaves[place]] * len(given), dim)
        handed = self._handed_in(given)
        for place, tensor in self.received:
            leaves[place] = handed[tensor].flatten(0, 1).movedim(0, tensor.dim)
        if self.shared:
            leaves[self.shared.place] = self.shared.mapping(given.carried[: len(self.shared.entering)])
        return Call(self.spread(given.hidden), *tree_unflatten(leaves, structure))

    def taken_up(self, call: Call, entering: Tensor | Entering, first: int) -> Call:
        """The model's own call where the blocks before `first` were left out: with what they left for this block."""
        if not isinstance(entering, Entering):
            return call
        leaves, structure = tree_flatten((call.args, call.kwargs))
        bound = tree_leaves(self.bound(entering)[1:])
        for place, tensor in self.received:
            leaves[place] = bound[place] if tensor.block < first else leaves[place]
        if self.shared and self.index == first:
            leaves[self.shared.place].update(bound[self.shared.place])
        return Call(call.hidden, *tree_unflatten(leaves, structure))

    def leaving(self, returned: object, call: Call, entering: Tensor | Entering) -> Tensor | Entering:
        """The block's output, from what it returned for a call; the next block's own arguments are not in it."""
        hidden_NTD = self.flat(hidden_in(returned)).float()
        carried = self.shared.left_in(self.shared_in(call)) if self.shared else ()
        if self.handed or self.returned:
            handed = self._handed_in(entering) if isinstance(entering, Entering) else {}
            handed |= {tensor: tensor.of(returned, len(hidden_NTD)) for tensor in self.returned}
            carried += tuple(handed[tensor] for tensor in self.leaving_tensors)
        return Entering(hidden_NTD, carried=carried) if carried else hidden_NTD

    @property
    def leaving_tensors(self) -> tuple[Handed, ...]:
        """The handed tensors that leave the block."""
        return (*(tensor for tensor in self.handed if tensor.until > self.index), *self.returned)

    def _handed_in(self, entering: Entering) -> dict[Handed, Tensor]:
        num_shared = len(self.shared.entering) if self.shared else 0
        return dict(zip(self.handed, entering.carried[num_shared:], strict=True))

    def shared_in(self, call: Call) -> MutableMapping:
        """The mapping that blocks pass on, in a call."""
        return tree_leaves((call.args, call.kwargs))[self.shared.place]

    def on_meta(self, hidden_shape: tuple[int, int, int]) -> Call:
        """The call for hidden states [N, T, D] on the meta device, where nothing is computed."""
        num, hidden = hidden_shape[0], torch.empty(hidden_shape, device="meta")
        if self.example is None:
            return Call(*to_meta(self.bound(hidden)))
        own, carried = (
            tuple(values.expand(num, *values.shape[1:]) for values in kept)
            for kept in (self.example.own, self.example.carried)
        )
        return Call(*to_meta(self.bound(Entering(hidden, own, carried))))
