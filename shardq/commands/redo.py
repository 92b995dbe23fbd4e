"""Doing blocks of a run again, if they are damaged or get other settings, and the files that complete a run."""

import re
import shutil
from collections.abc import Container
from pathlib import Path

from shardq.errors import ConfigError, ResumeError
from shardq.export.chosen import FORMATS
from shardq.export.contents import RECORD
from shardq.export.run_output import RunOutput
from shardq.files import remove, remove_folder
from shardq.logs import Display
from shardq.parallel.collectives import on_rank_zero, together
from shardq.parallel.ranks import Ranks
from shardq.rundir import ledger
from shardq.rundir.digests import changed_files
from shardq.rundir.folder import MODEL_CARD, RunFolder
from shardq.rundir.plan import ENCODINGS
from shardq.rundir.record import RunRecord

END = "end"


def blocks_asked(text: str, num_blocks: int) -> list[int]:
    """Numbers in rising order from a list such as `3,12-14`; `end` stands for the files that complete a run.

    Raises:
        ConfigError: the text is no such list, or names a block that the model does not have.
    """
    blocks: set[int] = set()
    for part in text.replace(" ", "").split(","):
        if part == END:
            continue
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", part, re.ASCII)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, -1)
        if not first <= last < num_blocks:
            raise ConfigError(
                f"redo: {part!r} is not allowed, it must be blocks from 0 to {num_blocks - 1} such as 3,12-14, or {END}"
            )
        blocks.update(range(first, last + 1))
    return sorted(blocks)


def begin_redo(output: Path, cache: Path, line: dict, asked: Container[str], ranks: Ranks, display: Display) -> None:
    """Remove activations and exports made from the blocks that a line names, then append the line to the ledger.

    Activations outside the output folder, which other hosts may keep, get another folder name from then on.

    Args:
        asked: formats that this run will write.
    """

    def begin() -> None:
        remove_folder(cache)
        for name in FORMATS:
            _remove_export(output, name, asked, display)
        ledger.append(output, line)

    together(ranks, lambda: shutil.rmtree(cache, ignore_errors=True))
    on_rank_zero(ranks, begin)
    blocks = f"block(s) {', '.join(map(str, line['redo']))}" if line["redo"] else "the files that complete the run"
    display.line(f"redo: {blocks}, and every block after one that comes out with other bytes")


def remove_what_completes(output: Path, asked: Container[str], display: Display) -> None:
    """Remove files that only a finished run has, so that no program loads mixed blocks, and shards of other formats.

    Args:
        asked: formats that this run will write; their shards are those of its blocks, and stay.
    """
    folder = RunFolder(output)
    for path in (folder.config, folder.index, output / MODEL_CARD, *map(folder.encodings, ENCODINGS)):
        remove(path)
    for name in FORMATS:
        if name not in asked:
            _remove_export(output, name, asked, display)


def _remove_export(output: Path, name: str, asked: Container[str], display: Display) -> None:
    folder = output / name
    # First: with these files, the folder would look complete to a finished run.
    remove(folder / RECORD)
    remove(folder / MODEL_CARD)
    if remove_folder(folder) and name not in asked:
        display.line(f"{folder}: removed; shardq export {output} --format {name} makes it again")


def mend(record: RunRecord, result: RunOutput, display: Display) -> None:
    """Write the files that complete a finished run again, if a quick check finds one missing or changed.

    Raises:
        ResumeError: a file's bytes are not the former ones.
    """
    if not record.is_finished:
        return
    output, entry = record.output, record.entries[None]
    damaged = dict(changed_files(output, entry, is_quick=True))
    if not damaged:
        return
    for fault in damaged.values():
        display.line(f"{fault}; written again")
    names = {output / name for name in entry["files"]}
    result.write_end(record, kept=names - damaged.keys())
    for path, _ in changed_files(output, entry, is_quick=True):
        raise ResumeError(f"{path}: does not come out as it was; restore it, or do it again with --redo end")
