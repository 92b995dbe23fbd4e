"""A quantization run from top to bottom: the checks, the blocks one after the other, the files that complete it."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from shardq.cache.store import open_store
from shardq.calib.partition import owned_samples
from shardq.commands.by_weights import quantize_by_weights
from shardq.commands.commit import OnCommit, commit_block, complete, export_missing
from shardq.commands.prepare import Run, begin, prepare
from shardq.commands.redo import remove_what_completes
from shardq.commands.resume import blocks_to_do, parts_of
from shardq.commands.space import check_space
from shardq.commands.summary import account_of_run, say_block_done, say_what_is_where, say_what_will_be_done, summary_of
from shardq.compiling import compiler, eager
from shardq.config import QuantizeConfig
from shardq.errors import located
from shardq.logs import Display, Events
from shardq.parallel.collectives import on_rank_zero
from shardq.parallel.engines import engine_for
from shardq.parallel.ranks import Ranks
from shardq.rundir.folder import RunFolder
from shardq.rundir.stop import stop_if_asked, stoppable
from shardq.summaries import QuantizeSummary
from shardq.training.block import float_pass, in_training, quantized_pass, start_at_nearest
from shardq.training.checkpoint import Checkpoints
from shardq.training.parts import quantize_by_parts
from shardq.training.passes import Activations
from shardq.training.trainer import Job, Recipe
from shardq.training.tries import train


def quantize(config: QuantizeConfig, ranks: Ranks, on_commit: OnCommit = lambda block: None) -> QuantizeSummary:
    """Quantize a model, or go on where an interrupted run stopped.

    Args:
        on_commit: called on rank 0 as each block is committed, and at the end.

    Raises:
        ShardQError: any of its kinds; the same on every rank where the cause is common.
    """
    begun = time.perf_counter()
    with ExitStack() as folder_lock:
        run = prepare(config, ranks, Display(ranks.rank), folder_lock)
        say_what_will_be_done(run)
        check_space(run)
        begin(run)
        if not run.record.is_finished:
            with _under_way(run, begun) as events:
                if run.config.uses_data:
                    _quantize_blocks(run, _job_of(run, events), on_commit)
                else:
                    quantize_by_weights(run, events, on_commit)
                complete(run, events, on_commit)
        export_missing(run)
        account = account_of_run(run)
        summary = summary_of(run, account, time.perf_counter() - begun)
        say_what_is_where(run, account, summary)
        return summary


def _quantize_blocks(run: Run, job: Job, on_commit: OnCommit) -> None:
    """Quantize and commit one block after the other, on the activations that reach it."""
    for loaded, check in blocks_to_do(run, job):
        block, begun = loaded.plan, time.perf_counter()
        with located(f"block {block.index} {block.name}"):
            if parts := parts_of(run, block):
                result, grids = quantize_by_parts(job, loaded, parts, check), {}
            else:
                seen = float_pass(job, loaded, check)
                with in_training(job, loaded, seen.grids) as training:
                    result = train(training, start_at_nearest(training, seen))  # ends with the fold
                grids = quantized_pass(job, loaded, seen.grids)
                del training
        gained = commit_block(run, job, block, result, grids, on_commit)
        del loaded  # frees the block's source before the block after the next is read
        say_block_done(run, block, result, gained, time.perf_counter() - begun)
        if run.record.num_done < run.plan.num_blocks:
            stop_if_asked(run.output, run.ranks, run.record.num_done, run.plan.num_blocks)


@contextmanager
def _under_way(run: Run, begun: float) -> Iterator[Events]:
    """Yield the log of an unfinished run; in the body the run can be asked to stop, and its time is logged.

    Args:
        begun: time at which `quantize` was called, on the performance counter.
    """
    # The log is opened only now: before the checks have passed, nothing may be written.
    events = Events(RunFolder(run.output).log(run.ranks), run.ranks.rank)
    events.record("start-up", run.ranks.start_up_seconds)
    events.record("prepare", time.perf_counter() - begun)
    with stoppable(run.output, run.ranks):
        on_rank_zero(run.ranks, lambda: remove_what_completes(run.output, run.config.export.asked, run.display))
        yield events
    events.record("run", run.ranks.start_up_seconds + time.perf_counter() - begun)


def _job_of(run: Run, events: Events) -> Job:
    config, ranks, (num_samples, length) = run.config, run.ranks, run.tokens_NT.shape
    return Job(
        recipe=Recipe(
            seed=config.seed,
            method=config.quant.method,
            optimize=config.optimize,
            activations=config.activations,
            written_dtype=run.result.dtype,
        ),
        skeleton=run.skeleton,
        tokens_NT=run.tokens_NT,
        activations=Activations(
            store=open_store(config.cache, run.cache, ranks.device),
            samples=owned_samples(num_samples, ranks.rank, ranks.world_size),
            sequence_length=length,
            device=ranks.device,
            waiting=events.waiting,
            pace=ranks.pace,
            blocks=run.plan.blocks,
        ),
        checkpoints=Checkpoints(run.output, config.checkpoint.every_iterations, engine_for(config.parallel, ranks)),
        events=events,
        display=run.display,
        compiled=compiler(ranks.device, run.display.line) if config.optimize.compile == "on" else eager,
    )
