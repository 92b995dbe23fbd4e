"""Records the arguments that the model passes to its decoder blocks, and finds what each depends on.

The model's own forward is run with stand-ins in the blocks' places on two sequences, one by one and both at once. An
argument that is equal in all three calls is passed to every sample. One that follows the sequence is kept for each
sample, like hidden states. What a block leaves for later ones, in a mapping that all share or among what it returns,
travels with the hidden states. Any other argument that differs is refused by name.
"""

from collections.abc import Callable, Iterable, Iterator, MutableMapping
from dataclasses import replace

import torch
from torch import Tensor

from shardq.errors import UnsupportedModelError
from shardq.model.arguments import BlockArguments, Call, Entering, Own
from shardq.model.chain import UNSUPPORTED, Received, check_chain, check_end, named
from shardq.model.compared import argument_names, is_equal
from shardq.model.handed import Handed, Shared
from shardq.model.hidden import lanes_of
from shardq.model.skeleton import Skeleton
from shardq.model.stand_in import to_meta
from shardq.torch_internals import tree_flatten, tree_leaves

CHAIN_TOKENS = 16  # tokens of the call that shows in which order blocks are called, and with which inputs


def record_arguments(
    skeleton: Skeleton, embed: Callable[[Tensor], Tensor], sequence_length: int
) -> list[BlockArguments]:
    """Each block's arguments for sequences of `sequence_length` tokens.

    Args:
        embed: what `prologue` yields.

    Raises:
        UnsupportedModelError: blocks are not called one after the other on what the one before gave, or an argument
            follows neither the sample nor the number of samples.
    """
    first_1T, second_1T = _two_sequences(skeleton, sequence_length)
    received = check_chain(skeleton, embed, first_1T[:, :CHAIN_TOKENS])
    check_end(skeleton, embed, (first_1T[:, :CHAIN_TOKENS], second_1T[:, :CHAIN_TOKENS]))
    apart = [_calls(skeleton, embed, tokens_NT) for tokens_NT in (first_1T, second_1T)]
    together = _calls(skeleton, embed, torch.cat([first_1T, second_1T]))
    calls = zip(*apart, together, received, strict=True)
    recorded = [_compared(skeleton, sequence_length, number, *of_block) for number, of_block in enumerate(calls)]
    return _followed(skeleton, sequence_length, _kept_once(recorded, together), received, together)


def _two_sequences(skeleton: Skeleton, length: int) -> tuple[Tensor, Tensor]:
    """Two sequences [1, T] that differ at every place, of tokens from the vocabulary's middle.

    Special tokens stand at its ends; those for images would ask for images.
    """
    num_tokens = skeleton.embeddings.num_embeddings
    apart = max(1, num_tokens // 4)
    first_T = apart + torch.randint(apart, (length,), generator=torch.Generator().manual_seed(0))
    return first_T[None] % num_tokens, (first_T[None] + apart) % num_tokens


def _calls(skeleton: Skeleton, embed: Callable[[Tensor], Tensor], tokens_NT: Tensor) -> list[Call]:
    embed(tokens_NT)
    return [Call(*stand_in.seen) for stand_in in skeleton.stand_ins]


def _compared(
    skeleton: Skeleton, length: int, number: int, first: Call, second: Call, both: Call, received: Received
) -> BlockArguments:
    """A block's arguments, from the calls with two sequences one by one, and with both."""
    where, names = named(skeleton, number), argument_names(skeleton, number, first)
    (leaves, structure), *others = (tree_flatten((call.args, call.kwargs)) for call in (first, second, both))
    if any(other != structure for _, other in others):
        raise UnsupportedModelError(f"{where} is passed other arguments for other sequences; {UNSUPPORTED}")
    own, repeated, rows, shared = [], [], [], None
    for place, values in enumerate(zip(leaves, *(leaves for leaves, _ in others), strict=True)):
        one, other, two = values
        if place in received:
            continue
        if isinstance(one, Tensor):
            how = None if one.is_meta else _follows(one, other, two)
            if how is None:
                raise UnsupportedModelError(
                    f"{where} is passed {names[place]}, which differs between samples but not row by row; {UNSUPPORTED}"
                )
            follows, dim = how
            if follows == "sample":
                own.append(Own(place, dim, number, f"own{place}"))
            elif follows != "nothing":
                {"number": repeated, "row": rows}[follows].append((place, dim))
        elif isinstance(one, MutableMapping):
            if shared is not None:
                raise UnsupportedModelError(f"{where} is passed two mappings that blocks share; {UNSUPPORTED}")
            shared = Shared(place, type(one), (), (), {})
        elif not (is_equal(one, other) and is_equal(one, two)):
            raise UnsupportedModelError(
                f"{where} is passed {names[place]} ({type(one).__name__}), which may differ from call to call; "
                f"{UNSUPPORTED}"
            )
    width = first.hidden.numel() // length
    lanes = lanes_of(first.hidden, 1, length, where)
    return BlockArguments(
        number, first.args, first.kwargs, width, lanes, tuple(own), tuple(repeated), tuple(rows), shared
    )


def _kept_once(recorded: list[BlockArguments], together: list[Call]) -> Iterator[BlockArguments]:
    """The arguments, with a tensor that several blocks are passed kept with the first of them."""
    kept: dict[tuple[int, int], Own] = {}
    for arguments, call in zip(recorded, together, strict=True):
        leaves = tree_leaves((call.args, call.kwargs))
        firsts = [kept.setdefault((id(leaves[own.place]), own.dim), own) for own in arguments.own]
        pairs = zip(arguments.own, firsts, strict=True)
        yield replace(arguments, own=tuple(own._replace(block=first.block, name=first.name) for own, first in pairs))


def _follows(one: Tensor, other: Tensor, both: Tensor) -> tuple[str, int] | None:
    """Whether a tensor follows the `sample`, their `number` or `nothing`, and in which dimension; None if unclear.

    `row` is a `number` that has one row for one sample, which most blocks broadcast.
    """
    if one.shape != other.shape or one.dim() != both.dim():
        return None
    is_same = is_equal(one, other)
    if is_same and is_equal(one, both):
        return "nothing", 0
    for dim in range(one.dim()):
        if both.shape[dim] == 2 * one.shape[dim] and is_equal(both, torch.cat([one, other], dim)):
            return ("row" if one.shape[dim] == 1 else "number") if is_same else "sample", dim
    return None


def _followed(
    skeleton: Skeleton, length: int, recorded: Iterable[BlockArguments], received: list[Received], together: list[Call]
) -> list[BlockArguments]:
    """The arguments with what blocks leave for one another, found by calling all of them on the meta device.

    Raises:
        UnsupportedModelError: a block does not take several sequences with the arguments recorded of one.
    """
    followed, carried, returns = [], _Carried(), _Returned(received)
    for number, arguments in enumerate(recorded):
        where = named(skeleton, number)
        if carried.tensors and not arguments.shared:
            raise UnsupportedModelError(f"{where} is not passed the mapping that earlier blocks share; {UNSUPPORTED}")
        shared = carried.entering(arguments.shared) if arguments.shared else None
        own = tuple(values[:1] for values in to_meta(arguments.own_of(together[number])))
        example = Entering(torch.empty(0, device="meta"), own, carried.of_one() + returns.of_one(number))
        handed, places = returns.entering(number), returns.received(number)
        arguments = replace(arguments, shared=shared, handed=handed, received=places, example=example)
        arguments, call, returned = _accepted(skeleton, arguments, length)
        if shared:
            arguments = replace(arguments, shared=carried.leaving(shared, arguments.shared_in(call), where))

        def returned_of(num: int, passed: BlockArguments = arguments) -> object:
            return skeleton.stand_ins[passed.index].on_meta(passed.on_meta((num, length, passed.width)))

        returned = returns.leaving(number, returned, returned_of, where)
        followed.append(replace(arguments, returned=returned))
    return followed


def _accepted(skeleton: Skeleton, arguments: BlockArguments, length: int) -> tuple[BlockArguments, Call, object]:
    """A block's arguments in the form in which it takes two samples, and call and return value on the meta device."""
    stand_in, hidden_shape = skeleton.stand_ins[arguments.index], (2, length, arguments.width)
    call = arguments.on_meta(hidden_shape)
    try:
        returned = stand_in.on_meta(call)
    except UnsupportedModelError:
        if not arguments.rows:
            raise
        arguments = replace(arguments, repeated=arguments.repeated + arguments.rows, rows=())
        call = arguments.on_meta(hidden_shape)
        returned = stand_in.on_meta(call)
    if tree_flatten((call.args, call.kwargs))[1] != tree_flatten((arguments.args, arguments.kwargs))[1]:
        raise UnsupportedModelError(f"{named(skeleton, arguments.index)} writes to what it is passed; {UNSUPPORTED}")
    return arguments, call, returned


class _Carried:
    """What is in the mapping that blocks share, on the meta device, as it goes from block to block."""

    def __init__(self) -> None:
        self.tensors: dict[tuple[str, int], Tensor] = {}
        self._is_tuple: dict[str, bool] = {}

    def entering(self, shared: Shared) -> Shared:
        """What a block finds in it."""
        found = tuple(self.tensors)
        return Shared(shared.place, shared.kind, found, found, dict(self._is_tuple))

    def of_one(self) -> tuple[Tensor, ...]:
        """Its tensors for one sample."""
        return tuple(tensor[:1] for tensor in self.tensors.values())

    def leaving(self, shared: Shared, mapping: MutableMapping, where: str) -> Shared:
        """What a block, called with two samples, leaves in it."""
        for key, value in mapping.items():
            tensors = value if isinstance(value, tuple) else (value,)
            if not all(isinstance(tensor, Tensor) and len(tensor) == 2 for tensor in tensors):
                raise UnsupportedModelError(f"{where} leaves {key!r} for later blocks, which is no tensor of a batch; "
                                            f"{UNSUPPORTED}")  # fmt: skip
            self._is_tuple[key] = isinstance(value, tuple)
            self.tensors |= {(key, place): tensor for place, tensor in enumerate(tensors)}
        return Shared(shared.place, shared.kind, shared.entering, tuple(self.tensors), dict(self._is_tuple))


class _Returned:
    """The values that blocks return and later ones are passed, on the meta device."""

    def __init__(self, received: list[Received]):
        """Take what each block receives of earlier ones."""
        self._received = received
        self._until = {origin: number for number, places in enumerate(received) for origin in places.values()}
        self._known: dict[tuple[int, int], Handed] = {}
        self._of_one: dict[Handed, Tensor] = {}

    def entering(self, number: int) -> tuple[Handed, ...]:
        """The values of earlier blocks that a block or a later one is passed."""
        return tuple(handed for handed in self._known.values() if handed.until >= number)

    def of_one(self, number: int) -> tuple[Tensor, ...]:
        """These values for one sample."""
        return tuple(self._of_one[handed] for handed in self.entering(number))

    def received(self, number: int) -> tuple[tuple[int, Handed], ...]:
        """The places of such values among a block's arguments."""
        return tuple((place, self._known[origin]) for place, origin in self._received[number].items())

    def leaving(
        self, number: int, returned: object, returned_of: Callable[[int], object], where: str
    ) -> tuple[Handed, ...]:
        """The values that later blocks are passed of what a block returns for two samples.

        Args:
            returned_of: what it returns for another number of samples.
        """
        leaves = [leaf for block, leaf in self._until if block == number]
        for leaf in leaves:
            shapes = zip(*(tree_leaves(given)[leaf].shape for given in (returned, returned_of(3))), strict=True)
            dims = [dim for dim, (of_two, of_three) in enumerate(shapes) if 3 * of_two == 2 * of_three]
            if len(dims) != 1:
                raise UnsupportedModelError(
                    f"{where} returns a tensor for later blocks that is not a sample's own; {UNSUPPORTED}"
                )
            handed = Handed(number, leaf, dims[0], self._until[number, leaf])
            self._known[number, leaf] = handed
            self._of_one[handed] = handed.of(returned, 2)[:1]
        return tuple(self._known[number, leaf] for leaf in leaves)
