"""Digests of the source's bytes: noted when the bytes are read, compared whenever they are read again.

This takes no extra pass: a tensor's digest is computed when its bytes are read for use. Tensors outside the blocks are
read completely when a run begins, because otherwise a value that is not finite would be found only after hours. Of the
others, samples are noted then, so that a file that is replaced during the run is detected when it is read.
"""

from collections.abc import Callable, Collection

from shardq.errors import CheckpointError
from shardq.formats.shards import TensorInfo
from shardq.formats.source import Digests, stored_in
from shardq.model.skeleton import Skeleton
from shardq.parallel.collectives import on_every_host, on_rank_zero, together
from shardq.parallel.ranks import Ranks
from shardq.rundir.plan import outside_blocks

LARGE_BYTES = 4 << 30  # from this size on, a line announces the reading, which takes long on a slow disk


def check_outside(skeleton: Skeleton) -> Digests:
    """Read all tensors outside the blocks, and return their digests.

    Raises:
        CheckpointError: a value is not finite, or a tensor has changed.
    """
    source, tensors = skeleton.source, outside_blocks(skeleton)
    buffers = {skeleton.tensor(name).name for name, _ in skeleton.model.named_buffers() if name in skeleton.tensors}
    for tensor in tensors:
        source.check(tensor, tensor.name in buffers)
    return {info.name: source.digests[info.name] for info in stored_in(tensors)}


def begin_with(skeleton: Skeleton, former: Digests, ranks: Ranks, say: Callable[[str], None]) -> None:
    """Compare a run's source with the bytes that it began with, and check tensors outside the blocks on every host.

    Args:
        former: digests from earlier parts of the run.
        say: gets a line if reading takes long.

    Raises:
        CheckpointError: as `check_outside` and `agree`.
    """
    source, outside = skeleton.source, stored_in(outside_blocks(skeleton))
    source.digests.update(former)
    num_bytes = sum(info.num_bytes for info in outside)
    if num_bytes > LARGE_BYTES:
        say(f"reading what lies outside the blocks, to check it: {num_bytes / 1e9:.1f} GB")
    source.digests.update(on_every_host(ranks, lambda: check_outside(skeleton)))
    on_rank_zero(ranks, lambda: source.note_samples(all_stored(skeleton)))
    agree(source.digests, outside, ranks)


def all_stored(skeleton: Skeleton) -> list[TensorInfo]:
    """What is read of the source, block by block and outside the blocks, each stored tensor or part of one once."""
    in_blocks = [skeleton.block_tensors(number).values() for number in range(len(skeleton.blocks))]
    return stored_in([tensor for tensors in (*in_blocks, outside_blocks(skeleton)) for tensor in tensors])


def agree(digests: Digests, infos: Collection[TensorInfo], ranks: Ranks) -> None:
    """Check that stored tensors, which every rank has read, are the same on all: hosts may have copies of their own.

    Args:
        digests: of at least these tensors, as this rank has read them.

    Raises:
        CheckpointError: naming a tensor that is not; the same on every rank.
    """

    def compare() -> None:
        for info in infos:
            if digests[info.name] != of_rank_zero[info.name]:
                raise CheckpointError(
                    f"{info.file}: tensor {info.name} is not what rank 0 reads; give every host the same files"
                )

    if ranks.world_size > 1:
        of_rank_zero = on_rank_zero(ranks, lambda: {info.name: digests[info.name] for info in infos})
        together(ranks, compare)


def noted(digests: Digests, skeleton: Skeleton, block_index: int) -> Digests:
    """Digests for a block's ledger line: of its tensors; with the first block's also of those outside all blocks."""
    tensors = [*skeleton.block_tensors(block_index).values(), *(outside_blocks(skeleton) if block_index == 0 else ())]
    return {info.name: digests[info.name] for info in stored_in(tensors) if info.name in digests}
