"""Whether a model's blocks form a chain, and which values that a block returns are passed to later ones.

The model's own forward is run with stand-ins that answer in the blocks' places, as often as that takes.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from shardq.errors import UnsupportedModelError
from shardq.model.arguments import Call
from shardq.model.compared import argument_names, is_equal
from shardq.model.hidden import lanes_of
from shardq.model.skeleton import Skeleton
from shardq.torch_internals import tree_leaves

UNSUPPORTED = "such models are not supported yet"
Received = dict[int, tuple[int, int]]
"""Places among the leaves of a block's arguments -> the earlier block that returned that value, and its leaf there."""


@dataclass
class _Chain:
    """The calls of all blocks in one forward, and what each is passed of what earlier ones returned."""

    calls: list[Call] = field(default_factory=list)
    received: list[Received] = field(default_factory=list)
    returned: list[object] = field(default_factory=list)


def check_chain(skeleton: Skeleton, embed: Callable[[Tensor], Tensor], tokens_1T: Tensor) -> list[Received]:
    """Check that blocks are called once each, in order, on what the block before gave; give what else they received.

    Other arguments must come from the tokens: two runs, in which stand-ins give different hidden states, must pass the
    same.

    Raises:
        UnsupportedModelError: it is not so; names the block.
    """
    chain, other = (_chain(skeleton, embed, tokens_1T, added) for added in (1.0, 2.0))
    for number, calls in enumerate(zip(chain.calls, other.calls, strict=True)):
        leaves = zip(*(tree_leaves((call.args, call.kwargs)) for call in calls), strict=True)
        for place, values in enumerate(leaves):
            is_received = place in chain.received[number]
            if isinstance(values[0], Tensor) and not is_received and not is_equal(*values):
                raise UnsupportedModelError(
                    f"{named(skeleton, number)} is passed {argument_names(skeleton, number, calls[0])[place]}, which "
                    f"is computed from what earlier blocks give; {UNSUPPORTED}"
                )
    return chain.received


def _chain(skeleton: Skeleton, embed: Callable[[Tensor], Tensor], tokens_1T: Tensor, added: float) -> _Chain:
    """The calls of all blocks, where each gives its hidden states with something added to them.

    A value that a block returns is recognised by the object: code that changes it on the way makes another.

    Raises:
        UnsupportedModelError: blocks do not form a chain.
    """
    chain, origins = _Chain(), {}

    def answer(number: int, call: Call) -> object:
        _check_call(skeleton, number, call, chain, tokens_1T.shape[1], added)
        received = {}
        for place, leaf in enumerate(tree_leaves((call.args, call.kwargs))):
            if id(leaf) in origins:
                received[place] = origins[id(leaf)]
            elif isinstance(leaf, Tensor) and leaf.is_meta:
                raise UnsupportedModelError(
                    f"{named(skeleton, number)} is passed {argument_names(skeleton, number, call)[place]}, which is "
                    f"computed from what earlier blocks return; {UNSUPPORTED}"
                )
        returned = skeleton.stand_ins[number].returned(call.hidden + added)
        tensors = enumerate(tree_leaves(returned))
        origins.update((id(leaf), (number, place)) for place, leaf in tensors if isinstance(leaf, Tensor))
        chain.calls.append(call)
        chain.received.append(received)
        chain.returned.append(returned)  # kept: the number of an object that is gone may be another's
        return returned

    with answering(skeleton, answer):
        embed(tokens_1T)
    if len(chain.calls) < len(skeleton.blocks):
        raise _not_called(skeleton, len(chain.calls))
    return chain


def _check_call(skeleton: Skeleton, number: int, call: Call, chain: _Chain, length: int, added: float) -> None:
    where = named(skeleton, number)
    lanes_of(call.hidden, 1, length, where)
    if number < len(chain.calls):
        raise UnsupportedModelError(f"{where} is called several times in one forward; {UNSUPPORTED}")
    if number > len(chain.calls):
        raise _not_called(skeleton, len(chain.calls))
    if chain.calls and not torch.equal(call.hidden, chain.calls[-1].hidden + added):
        raise UnsupportedModelError(f"{where} is called on other hidden states than the block before it gives; "
                                    f"{UNSUPPORTED}")  # fmt: skip


def check_end(skeleton: Skeleton, embed: Callable[[Tensor], Tensor], sequences: tuple[Tensor, Tensor]) -> None:
    """Check that the code after the blocks uses only the last block's hidden states, not the tokens.

    Raises:
        UnsupportedModelError: it uses others; logits of a stream would be those of other tokens.
    """
    base, last, outputs = skeleton.model.get_submodule(skeleton.base_name), len(skeleton.blocks) - 1, []

    def answer(number: int, call: Call) -> object:
        # Channels alike would be all zero behind a norm.
        hidden = torch.ones_like(call.hidden).cumsum(-1) if number == last else call.hidden
        return skeleton.stand_ins[number].returned(hidden)

    hook = base.register_forward_hook(lambda module, inputs, output: outputs.append(tree_leaves(output)[0]))
    try:
        with answering(skeleton, answer):
            for tokens_1T in sequences:
                embed(tokens_1T)
    finally:
        hook.remove()
    if not is_equal(*outputs):
        raise UnsupportedModelError(
            f"{type(skeleton.model).__name__}: what follows its blocks computes from the tokens, or from earlier "
            f"blocks, too; {UNSUPPORTED}"
        )


@contextmanager
def answering(skeleton: Skeleton, answer: Callable[[int, Call], object]) -> Iterator[None]:
    """While the body runs, stand-ins return what `answer` gives for a block's number and call."""
    for number, stand_in in enumerate(skeleton.stand_ins):
        stand_in.answer = lambda *call, number=number: answer(number, Call(*call))
    try:
        yield
    finally:
        for stand_in in skeleton.stand_ins:
            stand_in.answer = None


def _not_called(skeleton: Skeleton, number: int) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{named(skeleton, number)} is not called where there are tokens alone, or after later blocks; models with "
        "blocks for images or sound among the others are not supported yet"
    )


def named(skeleton: Skeleton, number: int) -> str:
    """A block in messages: the model's class and the block's name."""
    return f"{type(skeleton.model).__name__}: {skeleton.names[number]}"
