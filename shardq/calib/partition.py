"""Which rank owns which sample, and which samples an optimizer step sees."""

import math
from collections.abc import Iterator, Sequence

WATCHED = 8  # samples on which a block's loss is measured if none is held out; each costs a forward


def owned_samples(num_samples: int, rank: int, world_size: int) -> range:
    """Samples of a rank: every `world_size`-th. They stay with the rank, so activations never cross the network.

    A rank has none if there are fewer samples than ranks.
    """
    return range(rank, num_samples, world_size)


def step_samples(
    num_samples: int, batch_size: int, num_iterations: int, rank: int, world_size: int
) -> Iterator[tuple[int, list[int]]]:
    """Yield `(iteration, samples)`: this rank's part of each optimizer step's batch.

    The places of all batches, in order, go to the ranks in turn, and each rank fills its places with its samples in
    order, wrapping around. So a step sees `batch_size` consecutive samples, the same for any world size that divides
    `num_samples`; for others, ranks with one sample less wrap around sooner. Parts are equal where the world size
    divides `batch_size`; otherwise they differ by one, and may be empty.
    """
    own = owned_samples(num_samples, rank, world_size)
    for iteration in range(num_iterations):
        places = range(iteration * batch_size, (iteration + 1) * batch_size)
        yield iteration, [own[place // world_size % len(own)] for place in places if place % world_size == rank]


def largest_part(batch_size: int, world_size: int) -> int:
    """The largest number of samples that a rank has in a step's batch."""
    return math.ceil(batch_size / world_size)


def watched_samples(num_samples: int, num_held_out: int, rank: int, world_size: int) -> list[int]:
    """This rank's part of the samples on which a block's loss is measured: the last ones.

    They are the held-out samples or, where there are none, a few of the others.
    """
    first = num_samples - (num_held_out or min(WATCHED, num_samples))
    return [sample for sample in owned_samples(num_samples, rank, world_size) if sample >= first]


def chunks(samples: Sequence[int], size: int) -> list[list[int]]:
    """Samples in lists of at most `size`, for passes without training."""
    return [list(samples[start : start + size]) for start in range(0, len(samples), size)]
