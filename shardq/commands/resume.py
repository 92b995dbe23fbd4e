"""The blocks that a run has still to do, loaded in order, with their input activations."""

import shutil
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
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
from shardq.training.parts import Parts, again_by_parts
from shardq.training.passes import advance, replay
from shardq.training.self_check import Check, self_check
from shardq.training.streamed import Read, of_experts
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
    skeleton = run.skeleton
    stream = stream_blocks(skeleton, blocks, run.ranks.device, run.config.optimize.dtype,
                           partial(job.events.waiting, "input"), ahead=run.reads_ahead,
                           read=partial(_read, run))  # fmt: skip
    for block in blocks:
        with job.events.span("load", block=block.index):
            loaded = together(run.ranks, lambda: next(stream))
            tensors, later = skeleton.block_tensors(block.index), set(_read_later(run, block))
            stored = stored_in(tensor for name, tensor in tensors.items() if name not in later)
            agree(skeleton.source.digests, stored, run.ranks)
        yield loaded
        del loaded


def _read(run: Run, block: BlockPlan) -> dict[str, Tensor]:
    """A block's tensors, but for those of routed experts that are read later, a few at a time."""
    return read_weights(run.skeleton, block, run.ranks.device, set(_read_later(run, block)))


def _read_later(run: Run, block: BlockPlan) -> list[str]:
    """Names of the tensors of a block's routed experts if they are trained by parts."""
    return of_experts(run.skeleton.blocks[block.index]) if run.config.optimize.experts == "parts" else []


def parts_of(run: Run, block: BlockPlan) -> Parts | None:
    """How a block is trained by parts; None where it is not."""
    if not _read_later(run, block):
        return None

    def read(block: BlockPlan, names: list[str]) -> dict[str, Tensor]:
        values = together(run.ranks, lambda: _read_experts(run, block, names))
        stored = stored_in(run.skeleton.tensor(f"{block.name}.{name}") for name in names)
        agree(run.skeleton.source.digests, stored, run.ranks)
        return values

    return _parts(run, read)


def _parts(run: Run, read: Read) -> Parts:
    return Parts(at_once=run.experts_at_once, read=read, folder=run.cache / "experts")


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

    def through(loaded: LoadedBlock) -> None:
        run.display.start_part("activations again, block", loaded.index, first)
        _again(run, job, loaded)

    def compute() -> None:
        if first and are_there:
            activations.drop(first - 1)  # left by a kill right after a commit
        if not are_there:
            blocks = stream_blocks(run.skeleton, run.plan.blocks[:first], run.ranks.device, run.config.optimize.dtype,
                                   read=partial(_read, run))  # fmt: skip
            replay(activations, run.tokens_NT, run.skeleton, blocks, through)

    together(run.ranks, compute)


@torch.no_grad()
def _again(run: Run, job: Job, loaded: LoadedBlock) -> None:
    """Take both streams through a finished block; no other rank is waited for."""

    def put_written() -> None:
        later = set(_read_later(run, loaded.plan))
        matrices = [matrix for matrix in loaded.plan.grids if matrix.tensor not in later]
        for matrix, weight_OI in _written_weights(run, loaded.plan, matrices):
            matrix.put(loaded.module, weight_OI)

    if _read_later(run, loaded.plan):
        parts = _parts(run, partial(_read_experts, run))
        again_by_parts(job, loaded, parts, partial(_read_written_experts, run), put_written)
        return
    forward = served_forward(job, loaded)
    advance(job.activations, "fp", loaded.index, loaded)
    put_written()
    with _rounding(run, loaded):
        advance(job.activations, "quant", loaded.index, forward)


def _written_weights(run: Run, block: BlockPlan, some: Collection[Matrix]) -> Iterator[tuple[Matrix, Tensor]]:
    """Quantized weights of a finished block, as they are served and in the dtype of the computation."""
    device, dtype = run.ranks.device, run.config.optimize.dtype
    codes = read_block(RunFolder(run.output).block(block.index), {block.full_name(matrix) for matrix in some})
    for matrix in some:
        yield matrix, codes[block.full_name(matrix)].to(device).dequantized(run.result.dtype).to(dtype)


def _read_experts(run: Run, block: BlockPlan, names: list[str]) -> dict[str, Tensor]:
    """Tensors of routed experts, as the source has them."""
    tensors = {name: run.skeleton.tensor(f"{block.name}.{name}") for name in names}
    return {name: to_device(run.skeleton.source.read(tensor), run.ranks.device) for name, tensor in tensors.items()}


def _read_written_experts(run: Run, block: BlockPlan, names: list[str]) -> dict[str, Tensor]:
    """Tensors of routed experts, quantized ones as they are served."""
    wanted = [matrix for matrix in block.grids if matrix.tensor in set(names)]
    quantized = {matrix.tensor: weight_OI for matrix, weight_OI in _written_weights(run, block, wanted)}
    return quantized | _read_experts(run, block, [name for name in names if name not in quantized])


def _rounding(run: Run, loaded: LoadedBlock) -> AbstractContextManager:
    """Round a finished block's activations as in the run's pass of the quantized stream through it."""
    if not run.config.activations.in_training:
        return nullcontext()
    return simulated(loaded.module, written_grids(run.output, loaded.plan))
