"""A whole quantization run: plan, blocks in order, commits, export."""

import shutil
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from shardq.cache.store import open_store
from shardq.calib.partition import owned_samples
from shardq.commands.prepare import Run, begin, prepare
from shardq.commands.redo import remove_what_completes
from shardq.commands.said import not_finite, say_what_is_where
from shardq.commands.space import check_space
from shardq.compiling import compiler, eager
from shardq.config import ExportConfig, QuantizeConfig
from shardq.errors import located
from shardq.export.chosen import checkpoints_of
from shardq.export.write import write_format, write_missing_formats
from shardq.formats.options import FormatName
from shardq.formats.shards import read_header, read_tensor
from shardq.logs import Display, Events, peak_device_bytes, peak_rss_bytes, seconds_since_process_start
from shardq.matrix import Matrix
from shardq.model.block import BlockPlan, LoadedBlock
from shardq.model.weights import stream_blocks
from shardq.parallel.collectives import barrier, max_over_ranks, on_rank_zero, sum_over_ranks, together
from shardq.parallel.engines import engine_for
from shardq.parallel.ranks import Ranks
from shardq.quant.activation import ActivationGrid
from shardq.rundir import ledger
from shardq.rundir.block_output import rounding_to, stored_dtype, write_block_files, write_run_files
from shardq.rundir.folder import RunFolder
from shardq.rundir.source import agree, noted
from shardq.rundir.stop import stop_if_asked, stoppable
from shardq.training import checkpoint
from shardq.training.activation_grids import simulated, written_grids
from shardq.training.block import quantize_block
from shardq.training.checkpoint import Checkpoints
from shardq.training.objective import LOSSES
from shardq.training.passes import Activations, Forward, replay
from shardq.training.self_check import Check, self_check
from shardq.training.tries import BlockResult
from shardq.training.workshop import BlockJob, served_forward


def quantize(config: QuantizeConfig, ranks: Ranks) -> dict:
    """Quantize a model, or go on where an interrupted run stopped.

    Returns:
        `output`, `blocks`, `seconds` (of this process), `peak_rss_bytes` (of the largest rank), `loss_before` and
        `loss_after` (relative loss, mean over the blocks trained to their output), `divergence_before` and
        `divergence_after` (KL divergence from the fp model in nats a token, where the last block was trained to that).

    Raises:
        ShardQError: any of its kinds; the same on every rank where the cause is common.
    """
    start, started = time.perf_counter(), seconds_since_process_start()
    display = Display(ranks.rank)
    with ExitStack() as held:
        run = prepare(config, ranks, display, held)
        check_space(run)
        begin(run)
        events = Events(RunFolder(run.output).log(ranks), ranks.rank)
        if not run.record.is_finished:
            # No file to write to before the checks have passed.
            events.record("start-up", started)
            events.record("prepare", time.perf_counter() - start)
            with stoppable(run.output, ranks):
                _finish(run, events)
            events.record("run", started + time.perf_counter() - start)
        on_rank_zero(
            ranks, lambda: write_missing_formats((_export_of(run, chosen) for chosen in config.export.asked), display)
        )
        entries = run.record.entries
        blocks = [entries[block_index] for block_index in range(run.plan.num_blocks)]
        summary = {
            "output": str(run.output),
            "blocks": len(blocks),
            "seconds": round(time.perf_counter() - start, 3),
            "peak_rss_bytes": int(max_over_ranks(ranks, peak_rss_bytes())),
        }
        summary |= {
            f"{kind}_{when}": _mean(blocks, f"{kind}_{when}") for kind in LOSSES for when in ("before", "after")
        }
        say_what_is_where(run, summary, blocks)
        return summary


def _mean(entries: list[dict], key: str) -> float | None:
    """Mean of a fact over the blocks that have it; None if none has."""
    values = [entry[key] for entry in entries if key in entry]
    return sum(values) / len(values) if values else None


def _finish(run: Run, events: Events) -> None:
    """Quantize the blocks that are left and complete the output."""
    config, ranks, plan, record = run.config, run.ranks, run.plan, run.record
    cache = RunFolder(run.output).cache(config.cache, record.num_redos)
    store = open_store(config.cache, cache, ranks.device)
    samples = owned_samples(len(run.tokens_NT), ranks.rank, ranks.world_size)
    length = run.tokens_NT.shape[1]
    activations = Activations(store, samples, length, ranks.device, events.waiting, ranks.pace, plan.blocks)
    dtype = stored_dtype(run.skeleton, plan, config.export.dtype)
    engine = engine_for(config.parallel, ranks)
    job = BlockJob(
        run.skeleton, config.seed, config.quant.method, config.optimize, engine, run.tokens_NT,
        rounding_to(dtype), config.activations, activations, ranks, events, run.display,
        compiler(ranks.device, run.display.line) if config.optimize.compile == "on" else eager,
        Checkpoints(run.output, config.checkpoint.every_iterations, engine),
    )  # fmt: skip
    on_rank_zero(ranks, lambda: remove_what_completes(run.output, config.export.asked, run.display))
    with run.display.bars(plan.num_blocks, record.num_done):
        for loaded, check in _blocks_to_do(run, cache, job):
            block_index, num_before = loaded.index, record.num_done
            _quantize_and_commit(run, job, loaded, dtype, check)
            del loaded  # its source must not stay in memory while the block after the next is read
            num_done = record.num_done
            run.display.advance_block(num_done - num_before)
            if num_done <= num_before:
                run.display.line(f"block {block_index} has come out otherwise; all after it are done again")
            if num_done < plan.num_blocks:
                stop_if_asked(run.output, ranks, num_done, plan.num_blocks)
    with events.span("export"):
        shutil.rmtree(cache, ignore_errors=True)  # on every rank: each host may have one of its own
        record.lines.append(on_rank_zero(ranks, lambda: _complete(run, dtype)))


def _blocks_to_do(run: Run, cache: Path, job: BlockJob) -> Iterator[tuple[LoadedBlock, Check]]:
    """Blocks that are not finished, and what checks them; stretch by stretch where finished ones lie between them.

    The line of the block at hand has been added to the run's record before the next is asked for.
    """
    while True:
        todo = run.record.blocks_to_do(run.plan.num_blocks)
        with job.events.span("prepare activations"):
            _prepare_activations(run, cache, job, todo.start)
        with self_check(run.skeleton, run.tokens_NT, job.activations, run.ranks, run.config.optimize.dtype,
                        _tokens_through_block(run), todo.start) as check:  # fmt: skip
            for loaded in _agreed_blocks(run, run.plan.blocks[todo.start : todo.stop], job.events):
                yield loaded, check
                del loaded
        if not run.record.blocks_to_do(run.plan.num_blocks):
            return


def _tokens_through_block(run: Run) -> int:
    """About how many tokens a rank takes through each block, both ways in training; 0 where blocks are not checked."""
    optimize, (num_samples, length) = run.config.optimize, run.tokens_NT.shape
    trained = 0 if run.config.quant.method == "rtn" else 3 * optimize.iterations * optimize.batch_size
    return run.config.self_check * length * (2 * num_samples + trained) // run.ranks.world_size


def _agreed_blocks(run: Run, blocks: list[BlockPlan], events: Events) -> Iterator[LoadedBlock]:
    """Blocks as they are streamed; a rank that cannot read one, or reads another, stops all with its message."""
    stream = stream_blocks(run.skeleton, blocks, run.ranks.device, run.config.optimize.dtype,
                           partial(events.waiting, "input"), ahead=run.reads_ahead)  # fmt: skip
    for block in blocks:
        with events.span("load", block=block.index):
            loaded = together(run.ranks, lambda: next(stream))
            agree(run.skeleton, run.skeleton.block_tensors(block.index).values(), run.ranks)
        yield loaded
        del loaded


def _prepare_activations(run: Run, cache: Path, job: BlockJob, first: int) -> None:
    """Bring every rank's samples to block `first`, which is next, and say what a resume has to compute again.

    On the disk, samples are found by whichever rank owns them now.
    """
    activations = job.activations
    if run.config.cache.placement == "cpu":
        # An earlier attempt's files: they would not belong to the blocks that are committed from now on.
        on_rank_zero(run.ranks, lambda: shutil.rmtree(cache, ignore_errors=True))
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
            activations.drop(first - 1)  # a kill right after a commit leaves it
        if not are_there:
            replay(activations, run.tokens_NT, run.skeleton, run.plan.blocks[:first], run.config.optimize.dtype,
                   served, partial(_written_weights, run), partial(_rounding, run))  # fmt: skip

    together(run.ranks, compute)


def _written_weights(run: Run, block: BlockPlan) -> Iterator[tuple[Matrix, Tensor]]:
    """A finished block's quantized weights as they are served and computed with."""
    device, dtype = run.ranks.device, run.config.optimize.dtype
    written = read_header(run.output / run.plan.block_shard(block.index))
    for matrix in block.grids:
        (stored,) = matrix.stored
        yield matrix, read_tensor(written[stored]).to(device, dtype)


def _rounding(run: Run, loaded: LoadedBlock) -> AbstractContextManager:
    """Round a finished block's activations as it did when the quantized stream moved on through it."""
    if not run.config.activations.in_training:
        return nullcontext()
    return simulated(loaded.module, written_grids(run.output, loaded.plan))


def _quantize_and_commit(run: Run, job: BlockJob, loaded: LoadedBlock, dtype: torch.dtype, check: Check) -> None:
    """Quantize one block, write its files, make them count, drop what only this block needed; add its ledger line."""
    start, block = time.perf_counter(), loaded.plan
    job.display.start_block(block.name)
    with located(f"block {block.index} {block.name}"):
        result, grids = quantize_block(job, loaded, check)
    with job.events.span("commit", block=block.index):
        barrier(run.ranks)  # every rank's next generation is on disk
        run.record.lines.append(on_rank_zero(run.ranks, lambda: _commit(run, block, result, grids, dtype)))
        job.activations.drop(block.index)
    job.display.line(
        f"block {block.index} {block.name}, {run.record.num_done} of {run.plan.num_blocks} done: "
        f"{LOSSES[result.kind].format(result.loss_before, result.loss_after)}, "
        f"{time.perf_counter() - start:.1f} s, peak {peak_device_bytes(run.ranks.device) / 2**20:.0f} MiB"
        + (f"; {not_finite(result.facts)}" if result.failed_tries else "")
    )


def _commit(
    run: Run, block: BlockPlan, result: BlockResult, grids: dict[str, ActivationGrid], dtype: torch.dtype
) -> dict:
    files = write_block_files(run.output, run.skeleton, run.plan, block, result.linears, grids, dtype,
                              run.ranks.device)  # fmt: skip
    for name, chosen in checkpoints_of(run.config.export).items():
        path = run.output / name / run.plan.block_shard(block.index)
        chosen.write_shard(run.output, run.skeleton, block.index, path)
    facts = result.facts | {"source": noted(run.skeleton.digests, run.skeleton, block.index)}
    line = ledger.commit(run.output, block.index, files, world_size=run.ranks.world_size, **facts)
    checkpoint.remove(run.output)
    return line


def _complete(run: Run, dtype: torch.dtype) -> dict:
    checkpoint.remove(run.output)  # a kill right after the last block's ledger line leaves it
    files = write_run_files(run.output, run.skeleton, run.plan, dtype)
    for chosen in checkpoints_of(run.config.export):
        # Until the next line is there the folder holds shards of this run's blocks alone, each from before its commit.
        write_format(_export_of(run, chosen), run.display, is_begun=True)
    return ledger.complete(run.output, files)


def _export_of(run: Run, chosen: FormatName) -> ExportConfig:
    options = run.config.export
    return ExportConfig(
        str(run.output), chosen, dtype=options.dtype, activation_bits=options.activation_bits, aimet=options.aimet
    )
