"""A run without calibration data: every matrix goes to its nearest codes, read, quantized and written one by one.

No block is computed, so a block need not fit the memory, and ranks take blocks in turn without waiting for each other.
"""

import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from shardq.background import lookahead
from shardq.commands.commit import OnCommit, copies_of
from shardq.commands.prepare import Run
from shardq.devices import to_device
from shardq.errors import located
from shardq.formats.source import Digests
from shardq.logs import Events
from shardq.matrix import Matrix
from shardq.model.block import BlockPlan
from shardq.optimize.block_quantizer import checked
from shardq.optimize.linear_quantizer import LinearQuantizer
from shardq.parallel.collectives import gathered, on_rank_zero, together
from shardq.quant.quantized import QuantizedLinear
from shardq.rundir import ledger
from shardq.rundir.room import readable
from shardq.rundir.source import noted
from shardq.rundir.stop import stop_if_asked


def quantize_by_weights(run: Run, events: Events, on_commit: OnCommit) -> None:
    """Quantize and commit all blocks that are not finished, as many at the same time as there are ranks."""
    num_blocks, ranks = run.plan.num_blocks, run.ranks
    with run.display.bars(num_blocks, run.record.num_done):
        while todo := run.record.blocks_to_do(num_blocks):
            begun, blocks = time.perf_counter(), run.plan.blocks[todo.start : todo.stop][: ranks.world_size]
            _quantize(run, events, blocks, on_commit)
            seconds = time.perf_counter() - begun
            for block in blocks:
                num_bytes = sum(tensor.num_bytes for tensor in run.skeleton.block_tensors(block.index).values())
                run.display.line(
                    f"block {block.index} {block.name}, {run.record.num_done} of {num_blocks} done: "
                    f"{readable(num_bytes)} of weights, {seconds:.1f} s"
                )
            run.display.advance_block(len(blocks))
            if run.record.num_done < num_blocks:
                stop_if_asked(run.output, ranks, run.record.num_done, num_blocks)


def _quantize(run: Run, events: Events, blocks: list[BlockPlan], on_commit: OnCommit) -> None:
    """Quantize some blocks, one a rank, and commit them."""
    skeleton, own = run.skeleton, dict(enumerate(blocks)).get(run.ranks.rank)

    def write() -> tuple[list[Path], Digests]:
        """This rank's files, and the digests of what they are made of."""
        if own is None:
            return [], {}
        with located(f"block {own.index} {own.name}"):
            files = run.result.write_block_by_one(own, _nearest(run, own), run.ranks.device, copies_of(run))
        return files, noted(skeleton.source.digests, skeleton, own.index)

    with events.span("quantize", block=None if own is None else own.index):
        written = gathered(run.ranks, together(run.ranks, write))
    for block, (files, source) in zip(blocks, written, strict=False):
        with events.span("commit", block=block.index):
            _commit(run, block, files, source, on_commit)


def _commit(run: Run, block: BlockPlan, files: list[Path], source: Digests, on_commit: OnCommit) -> None:
    def commit() -> dict:
        on_commit(block.index)
        return ledger.commit(run.output, block.index, files, world_size=run.ranks.world_size, source=source)

    run.record.lines.append(on_rank_zero(run.ranks, commit))


@torch.no_grad()
def _nearest(run: Run, block: BlockPlan) -> Iterator[tuple[Matrix, QuantizedLinear]]:
    """Each matrix of a block on its start grid, one in memory and one being read."""
    tensors, is_searched = run.skeleton.block_tensors(block.index), run.config.optimize.start == "search"

    def read(matrix: Matrix) -> Tensor:
        return run.skeleton.source.read(tensors[matrix.tensor])

    for matrix, stored_OI in lookahead(read, block.grids):
        weight_OI = to_device(stored_OI, run.ranks.device)
        quantizer = LinearQuantizer(weight_OI, block.grids[matrix], "rtn").to(run.ranks.device)
        quantizer.start(weight_OI, weight_OI.new_ones(matrix.shape[1], dtype=torch.float32) if is_searched else None)
        yield matrix, checked(matrix.name, quantizer)
