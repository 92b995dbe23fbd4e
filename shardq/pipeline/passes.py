"""Passes without training: a stream's activations through one block, many samples at a time."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from shardq.cache.store import ActivationStore, Stream
from shardq.calib.partition import chunks
from shardq.lookahead import lookahead
from shardq.optimize.loss import ErrorSums, error_sums

PASS_TOKENS = (
    4096  # enough to keep matrix multiplies busy; activations of a pass stay far below a block's training state
)

Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Activations:
    """This rank's samples, where their activations are kept, and the device that computes."""

    store: ActivationStore
    samples: range
    sequence_length: int
    device: torch.device

    def load(self, stream: Stream, generation: int, samples: list[int]) -> Tensor:
        """Hidden states [N, T, D] of some samples, on the device."""
        return torch.stack([self.store.read(stream, generation, sample) for sample in samples]).to(self.device)

    def keep(self, stream: Stream, generation: int, samples: list[int], hidden_NTD: Tensor) -> None:
        """Write hidden states [N, T, D] of some samples to the store."""
        for sample, hidden_TD in zip(samples, hidden_NTD, strict=True):
            self.store.write(stream, generation, sample, hidden_TD)

    def chunks(self) -> list[list[int]]:
        """This rank's samples in the groups that a pass computes at once."""
        return chunks(self.samples, max(1, PASS_TOKENS // self.sequence_length))

    def holds(self, generation: int) -> bool:
        """Whether both streams of all samples are there."""
        return all(self.store.holds(generation, sample) for sample in self.samples)

    def drop(self, generation: int) -> None:
        """Forget a generation."""
        self.store.drop(generation, self.samples)


@torch.no_grad()
def embed_samples(activations: Activations, tokens_NT: Tensor, embed: Callable[[Tensor], Tensor]) -> None:
    """Write generation 0: the hidden states that enter block 0."""
    for samples in activations.chunks():
        activations.keep("fp", 0, samples, embed(tokens_NT[samples]))


@torch.no_grad()
def advance(activations: Activations, stream: Stream, generation: int, forward: Forward) -> None:
    """Take a stream through a block: read its generation, write the next."""
    for samples, hidden_NTD in lookahead(lambda some: activations.load(stream, generation, some), activations.chunks()):
        activations.keep(stream, generation + 1, samples, forward(hidden_NTD))


@torch.no_grad()
def compare(activations: Activations, generation: int, forward: Forward, keep: bool) -> ErrorSums:
    """Error of a block on the quantized stream against the fp stream's next generation, over this rank's samples.

    Args:
        keep: write the outputs as the quantized stream's next generation.
    """

    def load(samples: list[int]) -> tuple[Tensor, Tensor]:
        return activations.load("quant", generation, samples), activations.load("fp", generation + 1, samples)

    total = ErrorSums()
    for samples, (hidden_NTD, target_NTD) in lookahead(load, activations.chunks()):
        output_NTD = forward(hidden_NTD)
        total += error_sums(output_NTD, target_NTD)
        if keep:
            activations.keep("quant", generation + 1, samples, output_NTD)
    return total
