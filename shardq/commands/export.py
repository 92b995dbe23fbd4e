"""Converting a finished run for other programs."""

import time
from contextlib import suppress
from pathlib import Path

from shardq.config import ExportConfig
from shardq.errors import ConfigError, ResumeError, ShardQError
from shardq.export import contents
from shardq.export.chosen import check_options
from shardq.export.push import check_push, push
from shardq.export.write import summary_of, write_format
from shardq.files import remove_asides
from shardq.logs import Display
from shardq.parallel.collectives import on_rank_zero
from shardq.parallel.ranks import Ranks
from shardq.rundir.lock import only_run
from shardq.rundir.record import RunRecord
from shardq.summaries import ExportSummary


def export(config: ExportConfig, ranks: Ranks) -> ExportSummary:
    """Convert a finished run for other programs, in the memory of one block; rank 0 does it.

    A finished export is not written again, unless the run has changed since; an interrupted one is.

    Raises:
        ConfigError: the format cannot express the run's grid, or what an option asks for; the output folder holds
            something else.
        ResumeError: the folder holds no finished run, or its files have changed.
        StorageError: the export cannot be written or uploaded.
    """
    check_options(config)
    if config.push_to_hub is not None:
        check_push(config.push_to_hub)
    start, display = time.perf_counter(), Display(ranks.rank)
    summary = on_rank_zero(ranks, lambda: _pushed(config, _export(config, display), display))
    return summary | {"seconds": round(time.perf_counter() - start, 3)}


def _pushed(config: ExportConfig, summary: dict, display: Display) -> dict:
    """The summary of an export, after the upload if one is asked for."""
    if config.push_to_hub is None:
        return summary
    return summary | {"address": push(config.folder, config.push_to_hub, config.private, display.line)}


def _export(config: ExportConfig, display: Display) -> dict:
    """Write an export, or its missing part, if it is not finished yet."""
    folder = config.folder
    contents.check_place(folder)
    run = RunRecord.read(Path(config.run))
    if fault := run.why_unfinished():
        raise ResumeError(fault)
    try:
        with only_run(folder, display.line):
            remove_asides(folder)
            record = contents.read(folder)
            if record and contents.is_of_other_options(config, record):
                held = contents.options_of(record)
                raise ConfigError(f"output: {folder} holds an export to {held}; choose another or delete it")
            why = contents.why_unfinished(config, record, run.blocks_digest)
            if record and not why:
                display.line(f"{folder}: this export is finished, nothing is left to do")
                return summary_of(folder, record)
            if record:
                display.line(f"{why}; exported again")
            run.check_finished()
            return write_format(config, display)
    except ShardQError:
        with suppress(OSError):
            folder.rmdir()  # the folder of a refused export, only if it is empty
        raise
