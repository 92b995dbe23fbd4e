"""Passes without training: a stream's activations through one block, many samples at a time."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from shardq.background import behind, lookahead
from shardq.cache.store import STREAMS, ActivationStore, Stream
from shardq.calib.partition import chunks
from shardq.devices import mark_ready, pass_tokens, storage_threads, to_device, to_host
from shardq.liveness.stall import Pace
from shardq.model.arguments import Call, Entering, Own, hidden_of
from shardq.model.block import BlockPlan, LoadedBlock
from shardq.model.ends import prologue
from shardq.model.skeleton import Skeleton
from shardq.optimize.loss import ErrorSums

Forward = Callable[[Tensor | Entering], Tensor | Entering]
"""Function from a block's input, for some samples, to its output."""


@dataclass(frozen=True)
class Activations:
    """This rank's samples, the store of their activations, and the device that computes.

    `waiting`, given `input` or `output`, is entered while the computation waits for the store; steps are reported to
    `pace`. `blocks` are the plans whose arguments tell what enters a block besides hidden states; may be left out.
    """

    store: ActivationStore
    samples: Sequence[int]
    sequence_length: int
    device: torch.device
    waiting: Callable[[str], AbstractContextManager] = nullcontext
    pace: Pace = field(default_factory=Pace)
    blocks: Sequence[BlockPlan] = ()

    def load(self, stream: Stream, generation: int, samples: list[int]) -> Tensor:
        """Hidden states [N, T, D] of some samples, on the device."""
        return torch.stack([to_device(self.store.read(stream, generation, sample), self.device) for sample in samples])

    def entering(self, stream: Stream, block_index: int, samples: list[int]) -> Tensor | Entering:
        """A stream's input to a block for some samples, on the device."""
        hidden_NTD = self.load(stream, block_index, samples)
        own = tuple(self.load(kept.name, kept.block, samples) for kept in self._own(block_index))
        carried = tuple(self.load(name, block_index, samples) for name in self._carried(stream, block_index))
        return Entering(hidden_NTD, own, carried) if own or carried else hidden_NTD

    def _own(self, generation: int) -> tuple[Own, ...]:
        """The arguments of a block that are kept for each sample."""
        return self.blocks[generation].arguments.own if generation < len(self.blocks) else ()

    def _own_from(self, generation: int) -> set[tuple[int, Stream]]:
        """Generations and names of all that is kept for a block and later ones."""
        later = range(generation, len(self.blocks))
        return {(kept.block, kept.name) for block_index in later for kept in self._own(block_index)}

    def _carried(self, stream: Stream, generation: int) -> tuple[Stream, ...]:
        """Names of the tensors that earlier blocks have left in a stream for this block and later ones."""
        names = self.blocks[generation].arguments.carried_names if generation < len(self.blocks) else ()
        return tuple(f"{stream}-{name}" for name in names)

    def _streams(self, generation: int) -> tuple[Stream, ...]:
        return (*STREAMS, *(name for stream in STREAMS for name in self._carried(stream, generation)))

    def ahead(self, load: Callable, keys: Iterable, num_samples: int = 1) -> Iterator:
        """Yield `(key, load(key))` in order, loaded ahead of their use; the use of each is a step.

        Args:
            num_samples: samples that a key loads, if the device's memory is nearly full.
        """
        threads = storage_threads(self.device, num_samples)
        return self.pace.steps(lookahead(load, keys, partial(self.waiting, "input"), threads))

    @contextmanager
    def keeping(self, stream: Stream, generation: int) -> Iterator[Callable[[list[int], Tensor], None]]:
        """Yield a function that writes a block's output for some samples to the store, in the background."""

        def write(samples: list[int], values: dict[Stream, Tensor], ready: torch.cuda.Event | None) -> None:
            for name, values_N in values.items():
                for sample, value in zip(samples, to_host(values_N, ready), strict=True):
                    self.store.write(name, generation, sample, value)

        def keep(samples: list[int], left: Tensor | Entering) -> None:
            values = {stream: hidden_of(left)}
            if isinstance(left, Entering):  # after the last block nothing needs carried tensors
                values |= zip(self._carried(stream, generation), left.carried, strict=False)
            write_later(samples, values, mark_ready(hidden_of(left)))

        with behind(write, partial(self.waiting, "output"), storage_threads(self.device)) as write_later:
            yield keep

    def keep_own(self, block_index: int, samples: list[int], call: Call) -> None:
        """Write the arguments of a block that follow the sample, from the model's call with these samples."""
        own = self._own(block_index)
        given = self.blocks[block_index].arguments.own_of(call) if own else ()
        for kept, values_N in zip(own, given, strict=True):
            for sample, value in zip(samples, values_N.cpu(), strict=True):
                if kept.block == block_index:
                    self.store.write(kept.name, block_index, sample, value.contiguous())

    def chunks(self) -> list[list[int]]:
        """This rank's samples in the groups that a pass computes at once."""
        return chunks(self.samples, max(1, pass_tokens(self.device) // self.sequence_length))

    def holds(self, generation: int) -> bool:
        """Whether both streams of all samples are kept, with all that later blocks need of them."""
        own = self._own_from(generation)
        return all(
            self.store.holds(generation, sample, self._streams(generation))
            and all(self.store.holds(block_index, sample, [name]) for block_index, name in own)
            for sample in self.samples
        )

    def drop(self, generation: int, streams: Sequence[Stream] | None = None) -> None:
        """Forget a generation, with what no later block is passed, or some of it."""
        dropped = [(generation, streams or self._streams(generation))]
        if streams is None:
            unused = self._own_from(generation) - self._own_from(generation + 1)
            dropped += [(block_index, [name]) for block_index, name in unused]
        with behind(self.store.drop, threads=storage_threads(self.device)) as drop_later:
            for sample in self.samples:
                for block_index, names in dropped:
                    drop_later(block_index, sample, names)


@torch.no_grad()
def embed_samples(
    activations: Activations, tokens_NT: Tensor, skeleton: Skeleton, embed: Callable[[Tensor], Tensor]
) -> None:
    """Write generation 0, the hidden states that enter block 0, and for each block the samples' own arguments."""
    with activations.keeping("fp", 0) as keep:
        for samples in activations.chunks():
            hidden = embed(tokens_NT[samples])
            keep(samples, activations.blocks[0].arguments.flat(hidden))
            for block_index, stand_in in enumerate(skeleton.stand_ins):
                activations.keep_own(block_index, samples, Call(*stand_in.seen))


@torch.no_grad()
def advance(activations: Activations, stream: Stream, generation: int, forward: Forward) -> None:
    """Take a stream through a block: read its generation, write the next."""

    def load(samples: list[int]) -> Tensor | Entering:
        return activations.entering(stream, generation, samples)

    with activations.keeping(stream, generation + 1) as keep:
        for samples, entering in activations.ahead(load, activations.chunks()):
            keep(samples, forward(entering))


@torch.no_grad()
def replay(
    activations: Activations,
    tokens_NT: Tensor,
    skeleton: Skeleton,
    blocks: Iterable[LoadedBlock],
    through: Callable[[LoadedBlock], None],
) -> None:
    """Compute the input of the block after `blocks`: the embeddings, then both streams through these blocks.

    Args:
        blocks: all blocks before it.
        through: takes both streams through a block.
    """
    with prologue(skeleton, activations.device) as embed:
        embed_samples(activations, tokens_NT, skeleton, embed)
    for loaded in blocks:
        through(loaded)
        activations.drop(loaded.index)
        del loaded  # frees the block's source before the block after the next is read


@torch.no_grad()
def compare(
    activations: Activations,
    generation: int,
    samples: list[int],
    forward: Forward,
    errors: Callable[[Tensor, Tensor], ErrorSums],
) -> ErrorSums:
    """Error of a block on some samples' quantized stream against the fp stream's next generation.

    Args:
        errors: from an output and its target [1, T, D] to their error.
    """

    def load(sample: int) -> tuple[Tensor | Entering, Tensor]:
        return activations.entering("quant", generation, [sample]), activations.load("fp", generation + 1, [sample])

    pairs = (pair for _, pair in activations.ahead(load, samples))
    return sum((errors(hidden_of(forward(entering)), target_NTD) for entering, target_NTD in pairs), ErrorSums())
