"""Passes without training: a stream's activations through one block, many samples at a time."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from shardq.background import behind, lookahead
from shardq.cache.store import ActivationStore, Stream
from shardq.calib.partition import chunks
from shardq.devices import mark_ready, pass_tokens, storage_threads, to_device, to_host
from shardq.model.ends import prologue
from shardq.model.skeleton import Skeleton
from shardq.model.weights import LoadedBlock, stream_blocks
from shardq.optimize.loss import ErrorSums
from shardq.parallel.stall import Pace

Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Activations:
    """This rank's samples, where their activations are kept, and the device that computes.

    `waiting`, given `input` or `output`, is entered while the computation waits for the store; `pace` hears of steps.
    """

    store: ActivationStore
    samples: Sequence[int]
    sequence_length: int
    device: torch.device
    waiting: Callable[[str], AbstractContextManager] = nullcontext
    pace: Pace = field(default_factory=Pace)

    def load(self, stream: Stream, generation: int, samples: list[int]) -> Tensor:
        """Hidden states [N, T, D] of some samples, on the device."""
        return torch.stack([to_device(self.store.read(stream, generation, sample), self.device) for sample in samples])

    def ahead(self, load: Callable, keys: Iterable, num_samples: int = 1) -> Iterator:
        """`(key, load(key))` in order, each loaded while those before are in use: what is done with one is a step.

        Args:
            num_samples: that are loaded for a key where much else is in the device's memory.
        """
        threads = storage_threads(self.device, num_samples)
        return self.pace.steps(lookahead(load, keys, partial(self.waiting, "input"), threads))

    @contextmanager
    def keeping(self, stream: Stream, generation: int) -> Iterator[Callable[[list[int], Tensor], None]]:
        """Yield a function that writes hidden states [N, T, D] of some samples to the store, in the background."""

        def write(samples: list[int], hidden_NTD: Tensor, ready: torch.cuda.Event | None) -> None:
            for sample, hidden_TD in zip(samples, to_host(hidden_NTD, ready), strict=True):
                self.store.write(stream, generation, sample, hidden_TD)

        with behind(write, partial(self.waiting, "output"), storage_threads(self.device)) as write_later:
            yield lambda samples, hidden_NTD: write_later(samples, hidden_NTD, mark_ready(hidden_NTD))

    def chunks(self) -> list[list[int]]:
        """This rank's samples in the groups that a pass computes at once."""
        return chunks(self.samples, max(1, pass_tokens(self.device) // self.sequence_length))

    def holds(self, generation: int) -> bool:
        """Whether both streams of all samples are there."""
        return all(self.store.holds(generation, sample) for sample in self.samples)

    def drop(self, generation: int) -> None:
        """Forget a generation."""
        with behind(self.store.drop, threads=storage_threads(self.device)) as drop_later:
            for sample in self.samples:
                drop_later(generation, sample)


@torch.no_grad()
def embed_samples(activations: Activations, tokens_NT: Tensor, embed: Callable[[Tensor], Tensor]) -> None:
    """Write generation 0: the hidden states that enter block 0."""
    with activations.keeping("fp", 0) as keep:
        for samples in activations.chunks():
            keep(samples, embed(tokens_NT[samples]))


@torch.no_grad()
def advance(activations: Activations, stream: Stream, generation: int, forward: Forward) -> None:
    """Take a stream through a block: read its generation, write the next."""

    def load(samples: list[int]) -> Tensor:
        return activations.load(stream, generation, samples)

    with activations.keeping(stream, generation + 1) as keep:
        for samples, hidden_NTD in activations.ahead(load, activations.chunks()):
            keep(samples, forward(hidden_NTD))


@torch.no_grad()
def replay(
    activations: Activations,
    tokens_NT: Tensor,
    skeleton: Skeleton,
    num_blocks: int,
    forwards: Callable[[LoadedBlock], tuple[Forward, Forward]],
    written: Callable[[int], Iterable[tuple[str, Tensor]]],
    rounding: Callable[[LoadedBlock], AbstractContextManager],
) -> None:
    """Compute what enters block `num_blocks`: the embeddings, then both streams through the blocks before it.

    Args:
        forwards: gives what computes a block with its own weights, and what does once the quantized ones are there.
        written: gives these on the device, in the dtype that they are computed with, by their linear's name.
        rounding: rounds a block's activations where the quantized stream moves on through rounded ones.
    """
    with prologue(skeleton, activations.device) as embed:
        embed_samples(activations, tokens_NT, embed)
    for loaded in stream_blocks(skeleton, range(num_blocks), activations.device):
        forward, served_forward = forwards(loaded)
        advance(activations, "fp", loaded.index, forward)
        for name, weight in written(loaded.index):
            loaded.module.get_submodule(name).weight.data = weight
        with rounding(loaded):
            advance(activations, "quant", loaded.index, served_forward)
        activations.drop(loaded.index)
        del loaded, forward, served_forward  # its source must not stay in memory while the block after the next is read


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
        errors: of an output and its target [1, T, D].
    """

    def load(sample: int) -> tuple[Tensor, Tensor]:
        return activations.load("quant", generation, [sample]), activations.load("fp", generation + 1, [sample])

    pairs = (pair for _, pair in activations.ahead(load, samples))
    return sum((errors(forward(hidden_NTD), target_NTD) for hidden_NTD, target_NTD in pairs), ErrorSums())
