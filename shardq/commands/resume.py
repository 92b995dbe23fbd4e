"""The blocks that a run has still to do, loaded in order, with their input activations."""

import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial

from torch import Tensor

from shardq.commands.prepare import Run
from shardq.devices import to_device
from shardq.formats.block_file import read_block
from shardq.formats.source import stored_in
from shardq.matrix import Matrix
from shardq.model.block import BlockPlan, LoadedBlock
from shardq.model.weights import read_weights, stream_blocks
from shardq.parallel.collectives import on_rank_zero, sum_over_ranks, together
from shardq.rundir.folder import RunFolder
from shardq.rundir.source import agree
from shardq.training.activation_grids import simulated, written_grids
from shardq.training.parts import Parts
from shardq.training.passes import Forward, replay
from shardq.training.self_check import Check, self_check
from shardq.training.streamed import of_experts
from shardq.training.trainer import Job, served_forward


def blocks_to_do(run: Run, job: Job) -> Iterator[tuple[LoadedBlock, Check]]:
    """Yield the blocks that are not finished, each with its check; finished blocks between them are skipped.

    The caller adds a block's line to the run's record before it asks for the next block.
    """
    num_blocks = run.plan.num_blocks
    with run.display.bars(num_blocks, run.record.num_done):
        while True:
            todo = run.record.blocks_to_do(num_blocks)
            with job.events.span("prepare activations"):
                _prepare_activations(run, job, todo.start)
            with self_check(run.skeleton, run.tokens_NT, job.activations, run.ranks, run.config.optimize.dtype,
                            _tokens_through_block(run), todo.start) as check:  # fmt: skip
                for loaded in _agreed_blocks(run, job, run.plan.blocks[todo.start : todo.stop]):
                    run.display.start_block(loaded.plan.name)
                    yield loaded, check
                    del loaded
            if not run.record.blocks_to_do(num_blocks):
                return


def _tokens_through_block(run: Run) -> int:
    """Approximate number of tokens that a rank takes through each block, training included; 0 if none is checked."""
    optimize, (num_samples, length) = run.config.optimize, run.tokens_NT.shape
    trained = 0 if run.config.quant.method == "rtn" else 3 * optimize.iterations * optimize.batch_size
    return run.config.self_check * length * (2 * num_samples + trained) // run.ranks.world_size


def _agreed_blocks(run: Run, job: Job, blocks: list[BlockPlan]) -> Iterator[LoadedBlock]:
    """Stream blocks; a rank that cannot read one, or reads other bytes, stops all ranks with its message."""
    skeleton, by_parts = run.skeleton, run.config.optimize.experts == "parts"
    later = {block.index: of_experts(skeleton.blocks[block.index]) if by_parts else [] for block in blocks}

    def read(block: BlockPlan) -> dict[str, Tensor]:
        return read_weights(skeleton, block, run.ranks.device, later[block.index])

    stream = stream_blocks(skeleton, blocks, run.ranks.device, run.config.optimize.dtype,
                           partial(job.events.waiting, "input"), ahead=run.reads_ahead, read=read)  # fmt: skip
    for block in blocks:
        with job.events.span("load", block=block.index):
            loaded = together(run.ranks, lambda: next(stream))
            tensors = skeleton.block_tensors(block.index)
            stored = stored_in(tensor for name, tensor in tensors.items() if name not in set(later[block.index]))
            agree(skeleton.source.digests, stored, run.ranks)
        yield loaded
        del loaded


def parts_of(run: Run, block: BlockPlan) -> Parts | None:
    """How a block is trained by parts; None where it is not."""
    skeleton, ranks, device = run.skeleton, run.ranks, run.ranks.device
    if run.config.optimize.experts != "parts" or not of_experts(skeleton.blocks[block.index]):
        return None

    def read(block: BlockPlan, names: list[str]) -> dict[str, Tensor]:
        tensors = {name: skeleton.tensor(f"{block.name}.{name}") for name in names}
        values = together(
            ranks, lambda: {name: to_device(skeleton.source.read(tensor), device) for name, tensor in tensors.items()}
        )
        agree(skeleton.source.digests, stored_in(tensors.values()), ranks)
        return values

    return Parts(at_once=run.experts_at_once, read=read)


def _prepare_activations(run: Run, job: Job, first: int) -> None:
    """Bring every rank's samples to block `first`, and print what a resume has to compute again.

    Samples on the disk are found by the ranks that own them now, which may not be those that wrote them.
    """
    activations = job.activations
    if run.config.cache.placement == "cpu":
        # An earlier attempt's files: they would not belong to the blocks that are committed from now on.
        on_rank_zero(run.ranks, lambda: shutil.rmtree(run.cache, ignore_errors=True))
    are_there = first == run.plan.num_blocks or (first > 0 and activations.holds(first))
    num_without = int(sum_over_ranks(run.ranks, [float(not are_there)])[0])
    if first:
        cost = f"activations are computed again through {first} block(s) for {num_without} rank(s)"
        run.display.line(
            f"resuming in {run.output}: {run.record.num_done} of {run.plan.num_blocks} blocks are done; "
            f"{run.ranks.world_size} rank(s), begun with {run.record.entries[0]['world_size']}; "
            f"{cost if num_without else 'nothing is done again'}"
        )

    def served(loaded: LoadedBlock) -> Forward:
        run.display.start_part("activations again, block", loaded.index, first)
        return served_forward(job, loaded)

    def compute() -> None:
        if first and are_there:
            activations.drop(first - 1)  # left by a kill right after a commit
        if not are_there:
            replay(activations, run.tokens_NT, run.skeleton, run.plan.blocks[:first], run.config.optimize.dtype,
                   served, partial(_written_weights, run), partial(_rounding, run))  # fmt: skip

    together(run.ranks, compute)


def _written_weights(run: Run, block: BlockPlan) -> Iterator[tuple[Matrix, Tensor]]:
    """A finished block's quantized weights, as they are served and in the dtype of the computation."""
    device, dtype = run.ranks.device, run.config.optimize.dtype
    codes = read_block(RunFolder(run.output).block(block.index))
    for matrix in block.grids:
        yield matrix, codes[block.full_name(matrix)].to(device).dequantized(run.result.dtype).to(dtype)


def _rounding(run: Run, loaded: LoadedBlock) -> AbstractContextManager:
    """Round a finished block's activations as in the run's pass of the quantized stream through it."""
    if not run.config.activations.in_training:
        return nullcontext()
    return simulated(loaded.module, written_grids(run.output, loaded.plan))
