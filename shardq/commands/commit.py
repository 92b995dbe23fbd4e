"""Commits: writing a finished block's files and its line in the ledger, and at the end those of the whole run."""

import shutil
from collections.abc import Callable
from pathlib import Path

from shardq.commands.prepare import Run
from shardq.config import ExportConfig
from shardq.export.checkpoint import Checkpoint
from shardq.export.chosen import checkpoints_of
from shardq.export.write import write_format, write_missing_formats
from shardq.formats.options import FormatName
from shardq.logs import Events
from shardq.model.block import BlockPlan
from shardq.parallel.collectives import barrier, on_rank_zero
from shardq.quant.activation import ActivationGrid
from shardq.rundir import ledger
from shardq.rundir.source import noted
from shardq.training import checkpoint
from shardq.training.trainer import Job
from shardq.training.tries import BlockResult

OnCommit = Callable[[int | None], None]
"""Called on rank 0 with a block's number, None at the end, when all files are durable and only the line is missing."""


def commit_block(
    run: Run, job: Job, block: BlockPlan, result: BlockResult, grids: dict[str, ActivationGrid], on_commit: OnCommit
) -> int:
    """Write a block's files, append its line to the ledger, and drop the activations that only it needed.

    Returns:
        the change in the number of finished blocks; less than 1 if later blocks no longer count, because they were
        computed from this block's former bytes.
    """

    def commit() -> dict:
        files = run.result.write_block(block, result.linears, grids, run.ranks.device, copies_of(run))
        facts = result.facts | {"source": noted(run.skeleton.source.digests, run.skeleton, block.index)}
        on_commit(block.index)
        line = ledger.commit(run.output, block.index, files, world_size=run.ranks.world_size, **facts)
        checkpoint.remove(run.output)
        return line

    num_before = run.record.num_done
    with job.events.span("commit", block=block.index):
        barrier(run.ranks)  # every rank's next generation is on disk
        run.record.lines.append(on_rank_zero(run.ranks, commit))
        job.activations.drop(block.index)
    return run.record.num_done - num_before


def copies_of(run: Run) -> dict[Path, Checkpoint]:
    """The further checkpoints whose shards a run writes as it goes on, by folder."""
    return {run.output / name: form for name, form in checkpoints_of(run.config.export).items()}


def complete(run: Run, events: Events, on_commit: OnCommit) -> None:
    """Write a finished run's files outside its blocks, and the line that completes it."""

    def commit() -> dict:
        checkpoint.remove(run.output)  # a kill right after the last block's ledger line leaves it
        files = run.result.write_end(run.record)
        for chosen in checkpoints_of(run.config.export):
            # Until the line is written, the folder holds only shards of this run's blocks, each from before its commit.
            write_format(_export_of(run, chosen), run.display, is_begun=True)
        on_commit(None)
        return ledger.complete(run.output, files)

    with events.span("export"):
        shutil.rmtree(run.cache, ignore_errors=True)  # on every rank: each host may have its own cache
        run.record.lines.append(on_rank_zero(run.ranks, commit))


def export_missing(run: Run) -> None:
    """Write the formats that the options ask for and a finished run does not have yet."""
    exports = (_export_of(run, chosen) for chosen in run.config.export.asked)
    on_rank_zero(run.ranks, lambda: write_missing_formats(exports, run.display))


def _export_of(run: Run, chosen: FormatName) -> ExportConfig:
    options = run.config.export
    return ExportConfig(
        str(run.output), chosen, dtype=options.dtype, activation_bits=options.activation_bits, aimet=options.aimet
    )
