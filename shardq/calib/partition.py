"""Which rank owns which sample, and which samples an optimizer step sees."""

import math
from collections.abc import Iterator, Sequence

WATCHED = 8  # samples that show how far a block is off; every one is a forward through it


def owned_samples(num_samples: int, rank: int, world_size: int) -> range:
    """Samples of a rank: every `world_size`-th. It keeps them, so activations never cross the network.

    A rank has none if there are fewer samples than ranks.
    """
    return range(rank, num_samples, world_size)


def step_samples(
    num_samples: int, batch_size: int, num_iterations: int, rank: int, world_size: int
) -> Iterator[tuple[int, list[int]]]:
    """Yield `(iteration, samples)`: this rank's part of each optimizer step's batch.

    The places of all batches, one after the other, go to the ranks in turn, and each rank fills its own with its
    samples in order, wrapping around. So a step sees `batch_size` neighbouring samples, the same whatever the world
    size, where it divides `num_samples`; where it does not, the ranks with one sample less come round to theirs
    sooner. Parts are equal where the world size divides `batch_size`, else they differ by one, and may be empty.
    """
    own = owned_samples(num_samples, rank, world_size)
    for iteration in range(num_iterations):
        places = range(iteration * batch_size, (iteration + 1) * batch_size)
        yield iteration, [own[place // world_size % len(own)] for place in places if place % world_size == rank]


def largest_part(batch_size: int, world_size: int) -> int:
    """The most samples of a step's batch that a rank has."""
    return math.ceil(batch_size / world_size)


def watched_samples(num_samples: int, num_held_out: int, rank: int, world_size: int) -> list[int]:
    """This rank's part of the samples on which a block's loss is measured: the last ones.

    Those that are held out of training, or a few of the others where none is.
    """
    first = num_samples - (num_held_out or min(WATCHED, num_samples))
    return [sample for sample in owned_samples(num_samples, rank, world_size) if sample >= first]


def chunks(samples: Sequence[int], size: int) -> list[list[int]]:
    """Samples in lists of at most `size`, for passes without training."""
    return [list(samples[start : start + size]) for start in range(0, len(samples), size)]
