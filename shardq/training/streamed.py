"""Passes through a block whose routed experts are read a few at a time, because memory has no room for all.

All samples go through the block up to the experts, and what enters these is kept. Then the experts add up their
outputs, some after some. At last the samples go through the block again, with that sum in the experts' place.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from shardq.cache.store import STREAMS
from shardq.calib.partition import chunks
from shardq.devices import pass_tokens
from shardq.errors import UnsupportedModelError
from shardq.model.arguments import BlockArguments, Entering, Own
from shardq.model.block import BlockPlan, LoadedBlock, multiplying_in
from shardq.model.experts import answered, routed, routed_in
from shardq.model.weights import fill, return_freed_memory
from shardq.torch_internals import tree_leaves
from shardq.training.passes import Activations, advance

HIDDEN, CHOICE = "{}-routed-hidden", ("routed-index", "routed-weight")
"""What the experts of a block are given, as streams of the store, at the block's generation: the hidden states of
either stream, and the router's choice in the last one that was taken up to the experts."""
AT_START = "routed-start"
"""Stream of the outputs, added up, of experts at the start of their training."""
OUTPUT = "routed_output"
"""Name of the experts' outputs, added up: a stream of the store, and an argument of the block."""

Read = Callable[[BlockPlan, list[str]], dict[str, Tensor]]
"""From a block and names of tensors within it to the tensors, on the device; fails on all ranks or on none."""


@dataclass(frozen=True, kw_only=True)
class StreamedBlock:
    """A block whose routed experts have no weights but while they compute.

    Attributes:
        loaded: the block with the rest of its weights.
        name: name of the module of experts within the block.
        at_once: experts that are in memory at the same time.
        read: reads experts' tensors.
    """

    loaded: LoadedBlock
    activations: Activations
    name: str
    at_once: int
    read: Read

    @property
    def experts(self) -> nn.Module:
        """The module of experts."""
        return self.loaded.module.get_submodule(self.name)

    @property
    def index(self) -> int:
        """The block's place in the model."""
        return self.loaded.index

    @property
    def groups(self) -> list[range]:
        """Numbers of the experts that are in memory together."""
        num = self.experts.num_experts
        return [range(first, min(first + self.at_once, num)) for first in range(0, num, self.at_once)]

    def hidden(self, stream: str, samples: list[int]) -> Tensor:
        """Hidden states [T, D] of all tokens of some samples as they enter the experts."""
        return self.activations.load(HIDDEN.format(stream), self.index, samples).flatten(0, 1)

    def choice(self, samples: list[int]) -> tuple[Tensor, Tensor]:
        """Numbers and weights [T, K] of the experts that all tokens of some samples chose."""
        index_NTK, weight_NTK = (self.activations.load(name, self.index, samples) for name in CHOICE)
        return index_NTK.flatten(0, 1), weight_NTK.flatten(0, 1)

    def write(self, stream: str, samples: list[int], values_NX: Tensor) -> None:
        """Keep a tensor for each of some samples."""
        for sample, value_X in zip(samples, values_NX.cpu(), strict=True):
            self.activations.store.write(stream, self.index, sample, value_X)

    def drop(self) -> None:
        """Forget what the experts were given, and their outputs."""
        self.activations.drop(self.index, (*map(HIDDEN.format, STREAMS), *CHOICE, OUTPUT, AT_START))


def of_experts(block: nn.Module) -> list[str]:
    """Names of the parameters of a block's routed experts."""
    prefixes = tuple(f"{name}.{number}." for name, module in routed_in(block).items()
                     for number in range(module.num_experts))  # fmt: skip
    return [name for name, _ in block.named_parameters() if name.startswith(prefixes)]


def experts_name(block: nn.Module) -> str:
    """Name of a block's module of routed experts.

    Raises:
        UnsupportedModelError: it has several.
    """
    names = list(routed_in(block))
    if len(names) != 1:
        raise UnsupportedModelError(
            f"{type(block).__name__}: it has several modules of routed experts ({', '.join(names)}), which cannot be "
            "trained by parts; use --optimize.experts joint"
        )
    return names[0]


@torch.no_grad()
def route(block: StreamedBlock, stream: str) -> None:
    """Take a stream through a block up to its experts, and keep what enters them."""
    for samples, entering in _inputs(block, stream):

        def keep(hidden_TD: Tensor, index_TK: Tensor, weight_TK: Tensor, samples: list[int] = samples) -> Tensor:
            if len(hidden_TD) != len(samples) * block.activations.sequence_length:
                raise UnsupportedModelError(
                    f"{block.loaded.plan.name}.{block.name}: its experts are not given each token once, so they cannot "
                    "be trained by parts; use --optimize.experts joint"
                )
            names = (HIDDEN.format(stream), *CHOICE)
            for name, values in zip(names, (hidden_TD, index_TK, weight_TK), strict=True):
                block.write(name, samples, values.unflatten(0, (len(samples), -1)))
            return torch.zeros_like(hidden_TD)

        with answered(block.experts, keep):
            block.loaded(entering)


@torch.no_grad()
def add_outputs(block: StreamedBlock, some: range, stream: str, into: str, own: Sequence[int]) -> None:
    """Add the weighted outputs of some experts, which are in memory, to a sum that is kept; the first group begins it.

    Args:
        stream: the last stream that was taken up to the experts.
        into: stream of the store that keeps the sum.
        own: samples.
    """
    size = max(1, pass_tokens(block.activations.device) // block.activations.sequence_length)
    for samples in chunks(own, size):
        hidden_TD, (index_TK, weight_TK) = block.hidden(stream, samples), block.choice(samples)
        so_far_TD = block.activations.load(into, block.index, samples).flatten(0, 2) if some.start else None
        with multiplying_in(block.loaded.dtype, hidden_TD.device):
            sum_TD = routed(block.experts, hidden_TD, index_TK, weight_TK, some, so_far_TD)
        block.write(into, samples, sum_TD.unflatten(0, (len(samples), 1, -1)))


@contextmanager
def in_memory(block: StreamedBlock, some: range) -> Iterator[None]:
    """In the body, some experts have their weights."""
    modules = {f"{block.name}.{number}": block.experts.get_submodule(str(number)) for number in some}
    names = [f"{name}.{inner}" for name, module in modules.items() for inner in module.state_dict()]
    tensors = block.read(block.loaded.plan, names)
    for name, module in modules.items():
        own = {inner: tensors.pop(f"{name}.{inner}") for inner in list(module.state_dict())}
        fill(block.loaded.module, module, own, block.activations.device)
    try:
        yield
    finally:
        for module in modules.values():
            module.to("meta")
        return_freed_memory()


def finish(block: StreamedBlock, stream: str) -> None:
    """Take a stream through the whole block, with the experts' outputs that are kept."""
    with taking_outputs(block) as whole:
        advance(whole.activations, stream, block.index, whole.loaded)


@contextmanager
def taking_outputs(block: StreamedBlock) -> Iterator[StreamedBlock]:
    """Yield the block as it computes with the experts' outputs that are kept, one more argument for each sample."""
    taken: list[Tensor] = []

    def take(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        taken[:] = [kwargs[OUTPUT]] if OUTPUT in kwargs else []
        return args, {name: value for name, value in kwargs.items() if name != OUTPUT}

    plan, loaded = block.loaded.plan, block.loaded
    length, width = block.activations.sequence_length, _width(block)
    plan = replace(plan, arguments=_with_output(plan.arguments, torch.empty(1, length, width, device="meta")))
    blocks = [plan if other.index == plan.index else other for other in block.activations.blocks]
    hook = loaded.module.register_forward_pre_hook(take, with_kwargs=True)
    try:
        with answered(block.experts, lambda hidden_TD, *others: taken[0].flatten(0, 1).to(hidden_TD.dtype)):
            yield replace(block, loaded=replace(loaded, plan=plan),
                          activations=replace(block.activations, blocks=blocks))  # fmt: skip
    finally:
        hook.remove()


def _width(block: StreamedBlock) -> int:
    """Channels that leave the experts."""
    return block.experts.get_submodule("0").down_proj.out_features


def _with_output(arguments: BlockArguments, like_1TD: Tensor) -> BlockArguments:
    """A block's arguments, and one more that follows the sample."""
    place = len(tree_leaves((arguments.args, arguments.kwargs)))
    example = arguments.example or Entering(like_1TD)
    return replace(
        arguments,
        kwargs=arguments.kwargs | {OUTPUT: like_1TD},
        own=(*arguments.own, Own(place, 0, arguments.index, OUTPUT)),
        example=replace(example, own=(*example.own, like_1TD[None])),
    )


def _inputs(block: StreamedBlock, stream: str) -> Iterator[tuple[list[int], Tensor | Entering]]:
    activations = block.activations
    return activations.ahead(lambda samples: activations.entering(stream, block.index, samples), activations.chunks())
