"""The bytes of the model that a run is made from: noted as they are read, compared whenever they are read again.

No pass is made for it: a tensor's digest is taken where its bytes go by anyway. Those outside the blocks are read whole
as a run begins, because a value that is not finite among them would be met after hours only. Of the others, samples are
noted then, so that files which are exchanged while the run is under way are found as they are read.
"""

from collections.abc import Callable, Collection

from shardq.errors import CheckpointError
from shardq.formats.shards import TensorInfo
from shardq.formats.source import Digests, stored_in
from shardq.model.skeleton import Skeleton
from shardq.parallel.collectives import on_every_host, on_rank_zero, together
from shardq.parallel.ranks import Ranks
from shardq.rundir.plan import outside_blocks

LARGE_BYTES = 4 << 30  # of which a slow disk takes so long that it is said beforehand


def check_outside(skeleton: Skeleton) -> Digests:
    """Read all that lies outside the blocks; give its digests.

    Raises:
        CheckpointError: a value is not finite, or a tensor is not what it was.
    """
    source, tensors = skeleton.source, outside_blocks(skeleton)
    buffers = {skeleton.aliases.get(name, name) for name, _ in skeleton.model.named_buffers()}
    for tensor in tensors:
        source.check(tensor, tensor.name in buffers)
    return {info.name: source.digests[info.name] for info in stored_in(tensors)}


def begin_with(skeleton: Skeleton, former: Digests, ranks: Ranks, say: Callable[[str], None]) -> None:
    """Have a run go on with the bytes that it began with, and check those outside the blocks on every host.

    Args:
        former: digests of what an earlier part of the run has read.
        say: is given a line where reading takes long.

    Raises:
        CheckpointError: as `check_outside` and `agree`.
    """
    source, outside = skeleton.source, stored_in(outside_blocks(skeleton))
    source.digests.update(former)
    num_bytes = sum(info.num_bytes for info in outside)
    if num_bytes > LARGE_BYTES:
        say(f"reading what lies outside the blocks, to check it: {num_bytes / 1e9:.1f} GB")
    source.digests.update(on_every_host(ranks, lambda: check_outside(skeleton)))
    on_rank_zero(ranks, source.note_samples)
    agree(source.digests, outside, ranks)


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
    """Those that a block's ledger line keeps: of its own tensors, and with the first block's of those outside all."""
    tensors = [*skeleton.block_tensors(block_index).values(), *(outside_blocks(skeleton) if block_index == 0 else ())]
    return {info.name: digests[info.name] for info in stored_in(tensors) if info.name in digests}
