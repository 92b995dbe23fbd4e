"""Records the arguments that the model passes to its decoder blocks, and finds what each depends on.

The model's own forward is run with stand-ins in the blocks' places on two sequences, one by one and both at once. An
argument that is equal in all three calls is passed to every sample. One that follows the sequence is kept for each
sample, like hidden states. Keys and values that a block leaves in a mapping for later blocks travel with the hidden
states. Any other argument that differs is refused by name.
"""

from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from shardq.errors import UnsupportedModelError
from shardq.model.arguments import BlockArguments, Call, Entering, Shared
from shardq.model.compared import argument_names, is_equal
from shardq.model.skeleton import Skeleton, to_meta
from shardq.torch_internals import tree_flatten

CHAIN_TOKENS = 16  # tokens of the call that shows in which order blocks are called, and with which inputs
_UNSUPPORTED = "such models are not supported yet"


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
    _check_chain(skeleton, embed, first_1T[:, :CHAIN_TOKENS])
    _check_end(skeleton, embed, (first_1T[:, :CHAIN_TOKENS], second_1T[:, :CHAIN_TOKENS]))
    apart = [_calls(skeleton, embed, tokens_NT) for tokens_NT in (first_1T, second_1T)]
    together = _calls(skeleton, embed, torch.cat([first_1T, second_1T]))
    recorded = [_compared(skeleton, number, *calls) for number, calls in enumerate(zip(*apart, together, strict=True))]
    return _followed(skeleton, recorded, together)


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


@contextmanager
def _answering(skeleton: Skeleton, answer: Callable[[int, Call], Tensor]) -> Iterator[None]:
    """While the body runs, stand-ins give what `answer` makes of a block's number and call, as the block would."""
    for number, stand_in in enumerate(skeleton.stand_ins):
        stand_in.answer = lambda *call, number=number, stand_in=stand_in: stand_in.returned(answer(number, Call(*call)))
    try:
        yield
    finally:
        for stand_in in skeleton.stand_ins:
            stand_in.answer = None


def _check_chain(skeleton: Skeleton, embed: Callable[[Tensor], Tensor], tokens_1T: Tensor) -> None:
    """Check that blocks are called once each, in order, on what the block before gave, with arguments from the tokens.

    Two runs, in which stand-ins give different hidden states, must pass the same arguments.
    """
    runs = [_chain(skeleton, embed, tokens_1T, added) for added in (1.0, 2.0)]
    for number, (call, other) in enumerate(zip(*runs, strict=True)):
        leaves, others = (tree_flatten((one.args, one.kwargs))[0] for one in (call, other))
        for place, values in enumerate(zip(leaves, others, strict=True)):
            if isinstance(values[0], Tensor) and not is_equal(*values):
                raise UnsupportedModelError(
                    f"{_named(skeleton, number)} is passed {argument_names(skeleton, number, call)[place]}, which "
                    f"comes from what earlier blocks give; {_UNSUPPORTED}"
                )


def _chain(skeleton: Skeleton, embed: Callable[[Tensor], Tensor], tokens_1T: Tensor, added: float) -> list[Call]:
    """The calls of all blocks, where each gives its hidden states with something added to them.

    Raises:
        UnsupportedModelError: blocks do not form a chain.
    """
    calls: list[Call] = []

    def answer(number: int, call: Call) -> Tensor:
        where = _named(skeleton, number)
        _check_hidden(where, call.hidden)
        if number < len(calls):
            raise UnsupportedModelError(f"{where} is called several times in one forward; {_UNSUPPORTED}")
        if number > len(calls):
            raise _not_called(skeleton, len(calls))
        if any(isinstance(leaf, Tensor) and leaf.is_meta for leaf in tree_flatten((call.args, call.kwargs))[0]):
            raise UnsupportedModelError(f"{where} takes more than hidden states from the blocks before it; "
                                        f"{_UNSUPPORTED}")  # fmt: skip
        if calls and not torch.equal(call.hidden, calls[-1].hidden + added):
            raise UnsupportedModelError(f"{where} is called on other hidden states than the block before it gives; "
                                        f"{_UNSUPPORTED}")  # fmt: skip
        calls.append(call)
        return call.hidden + added

    with _answering(skeleton, answer):
        embed(tokens_1T)
    if len(calls) < len(skeleton.blocks):
        raise _not_called(skeleton, len(calls))
    return calls


def _check_end(skeleton: Skeleton, embed: Callable[[Tensor], Tensor], sequences: tuple[Tensor, Tensor]) -> None:
    """Check that the code after the blocks uses only the last block's hidden states, not the tokens.

    Raises:
        UnsupportedModelError: it uses others; logits of a stream would be those of other tokens.
    """
    base, last, outputs = skeleton.model.get_submodule(skeleton.base_name), len(skeleton.blocks) - 1, []

    def answer(number: int, call: Call) -> Tensor:
        # Channels alike would be all zero behind a norm.
        return torch.ones_like(call.hidden).cumsum(-1) if number == last else call.hidden

    hook = base.register_forward_hook(lambda module, inputs, output: outputs.append(tree_flatten(output)[0][0]))
    try:
        with _answering(skeleton, answer):
            for tokens_1T in sequences:
                embed(tokens_1T)
    finally:
        hook.remove()
    if not is_equal(*outputs):
        raise UnsupportedModelError(
            f"{type(skeleton.model).__name__}: what follows its blocks computes from the tokens too; {_UNSUPPORTED}"
        )


def _not_called(skeleton: Skeleton, number: int) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{_named(skeleton, number)} is not called where there are tokens alone, or after later blocks; models with "
        "blocks for images or sound among the others are not supported yet"
    )


def _check_hidden(name: str, hidden: Tensor) -> None:
    if hidden.dim() != 3:
        raise UnsupportedModelError(
            f"{name} takes hidden states of {hidden.dim()} dimensions (several streams of them); {_UNSUPPORTED}"
        )


def _named(skeleton: Skeleton, number: int) -> str:
    return f"{type(skeleton.model).__name__}: {skeleton.names[number]}"


def _compared(skeleton: Skeleton, number: int, first: Call, second: Call, both: Call) -> BlockArguments:
    """A block's arguments, from the calls with two sequences one by one, and with both."""
    where = _named(skeleton, number)
    names = argument_names(skeleton, number, first)
    (leaves, structure), *others = (tree_flatten((call.args, call.kwargs)) for call in (first, second, both))
    _check_hidden(where, first.hidden)
    if any(other != structure for _, other in others):
        raise UnsupportedModelError(f"{where} is passed other arguments for other sequences; {_UNSUPPORTED}")
    own, repeated, rows, shared = [], [], [], None
    for place, values in enumerate(zip(leaves, *(leaves for leaves, _ in others), strict=True)):
        one, other, two = values
        if isinstance(one, Tensor):
            how = _follows(one, other, two)
            if how is None:
                raise UnsupportedModelError(
                    f"{where} is passed {names[place]}, which differs between samples but not row by row; "
                    f"{_UNSUPPORTED}"
                )
            follows, dim = how
            {"sample": own, "number": repeated, "row": rows, "nothing": []}[follows].append((place, dim))
        elif isinstance(one, MutableMapping):
            if shared is not None:
                raise UnsupportedModelError(f"{where} is passed two mappings that blocks share; {_UNSUPPORTED}")
            shared = Shared(place, type(one), (), (), {})
        elif not (is_equal(one, other) and is_equal(one, two)):
            raise UnsupportedModelError(
                f"{where} is passed {names[place]} ({type(one).__name__}), which may differ from call to call; "
                f"{_UNSUPPORTED}"
            )
    width = first.hidden.shape[-1]
    return BlockArguments(first.args, first.kwargs, width, tuple(own), tuple(repeated), tuple(rows), shared)


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


def _followed(skeleton: Skeleton, recorded: list[BlockArguments], together: list[Call]) -> list[BlockArguments]:
    """The arguments with what blocks leave for one another, found by calling all of them on the meta device.

    Raises:
        UnsupportedModelError: a block does not take several sequences with the arguments recorded of one.
    """
    followed, carried = [], _Carried()
    for number, arguments in enumerate(recorded):
        where = _named(skeleton, number)
        if carried.tensors and not arguments.shared:
            raise UnsupportedModelError(f"{where} is not passed the mapping that earlier blocks share; {_UNSUPPORTED}")
        shared = carried.entering(arguments.shared) if arguments.shared else None
        own = tuple(values[:1] for values in to_meta(arguments.own_of(together[number])))
        example = Entering(torch.empty(0, device="meta"), own, carried.of_one())
        arguments = replace(arguments, shared=shared, example=example)
        arguments, call = _accepted(skeleton, number, arguments, (2, *together[number].hidden.shape[1:]))
        if shared:
            arguments = replace(arguments, shared=carried.leaving(shared, arguments.shared_in(call), where))
        followed.append(arguments)
    return followed


def _accepted(
    skeleton: Skeleton, number: int, arguments: BlockArguments, hidden_shape: tuple[int, int, int]
) -> tuple[BlockArguments, Call]:
    """A block's arguments in the form in which it takes several samples, and the call on the meta device."""
    stand_in, call = skeleton.stand_ins[number], arguments.on_meta(hidden_shape)
    try:
        stand_in.on_meta(call)
    except UnsupportedModelError:
        if not arguments.rows:
            raise
        arguments = replace(arguments, repeated=arguments.repeated + arguments.rows, rows=())
        call = arguments.on_meta(hidden_shape)
        stand_in.on_meta(call)
    if tree_flatten((call.args, call.kwargs))[1] != tree_flatten((arguments.args, arguments.kwargs))[1]:
        raise UnsupportedModelError(f"{_named(skeleton, number)} writes to what it is passed; {_UNSUPPORTED}")
    return arguments, call


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
                                            f"{_UNSUPPORTED}")  # fmt: skip
            self._is_tuple[key] = isinstance(value, tuple)
            self.tensors |= {(key, place): tensor for place, tensor in enumerate(tensors)}
        return Shared(shared.place, shared.kind, shared.entering, tuple(self.tensors), dict(self._is_tuple))
