"""Which rank owns which sample, and which samples an optimizer step sees."""

from collections.abc import Iterator

WATCHED = 8  # samples that show how far a block is off; every one is a forward through it


def owned_samples(num_samples: int, rank: int, world_size: int) -> range:
    """Samples of a rank: every `world_size`-th. It keeps them, so activations never cross the network."""
    return range(rank, num_samples, world_size)


def step_samples(
    num_samples: int, batch_size: int, num_iterations: int, rank: int, world_size: int
) -> Iterator[tuple[int, list[int]]]:
    """Yield `(iteration, samples)`: this rank's part of each optimizer step's batch.

    Over all ranks, a step sees `batch_size` neighbouring samples, in order and wrapping around: the same samples
    whatever the world size, if it divides `batch_size` and `num_samples`.
    """
    for iteration in range(num_iterations):
        batch = [(iteration * batch_size + number) % num_samples for number in range(batch_size)]
        yield iteration, [sample for sample in batch if sample % world_size == rank]


def watched_samples(num_samples: int, num_held_out: int, rank: int, world_size: int) -> list[int]:
    """This rank's part of the samples on which a block's loss is measured: the last ones.

    Those that are held out of training, or a few of the others where none is.
    """
    first = num_samples - (num_held_out or min(WATCHED, num_samples))
    return [sample for sample in owned_samples(num_samples, rank, world_size) if sample >= first]


def chunks(samples: range, size: int) -> list[list[int]]:
    """Samples in lists of at most `size`, for passes without training."""
    return [list(samples[start : start + size]) for start in range(0, len(samples), size)]
