"""Checks of a run's folder: files that do not belong there, damaged logs, exports."""

import json
from collections.abc import Iterator
from pathlib import Path

from shardq.errors import ResumeError
from shardq.export import contents
from shardq.export.chosen import FORMATS
from shardq.files import storage_errors
from shardq.rundir.folder import LOCK, MANIFEST, RunFolder
from shardq.rundir.record import RunRecord


def folder_faults(record: RunRecord) -> Iterator[str]:
    """Files that belong to no finished run, and lines of ledger and logs that are no JSON."""
    output = record.output
    known = set(record.files)
    folder, exports = RunFolder(output), set(exports_in(output))
    logs = folder.logs
    known |= {MANIFEST, folder.ledger.name, LOCK}
    for path in sorted(output.rglob("*")):
        if path.is_dir() or path in logs or not exports.isdisjoint(path.parents):
            continue
        may_be_copied = record.is_of_before and path.suffix != ".safetensors"
        if str(path.relative_to(output)) not in known and not may_be_copied:
            yield f"{path}: no file of this run; move it elsewhere"
    for path in (folder.ledger, *logs):
        yield from _log_faults(path)


def export_faults(record: RunRecord) -> Iterator[str]:
    """Exports in a run's folder that have changed since they were finished, or are not of this run's blocks."""
    blocks = record.blocks_digest
    for folder in exports_in(record.output):
        try:
            export = contents.read(folder)
        except ResumeError as error:
            yield str(error)
            continue
        if export is not None:
            yield from contents.faults(folder, export, blocks)
        elif not record.is_of_before:
            yield f"{folder}: no {contents.RECORD}, which says what was written there; delete it and export again"


def unproved(record: RunRecord) -> dict[str, str]:
    """Files without a digest, by check, in a run made before there were digests of them."""
    if not record.is_of_before:
        return {}
    bare = [folder.name for folder in exports_in(record.output) if not (folder / contents.RECORD).exists()]
    notes = {"folder": "ok, but manifest, tokenizer and other copied files have no digest: the run is of before"}
    return notes | ({"exports": f"not known of {', '.join(bare)}: written before exports had digests"} if bare else {})


def exports_in(output: Path) -> list[Path]:
    """Folders of exports: those with a record, and those that are named after a format."""
    recorded = {path.parent for path in output.rglob(contents.RECORD)}
    named = {output / name for name in FORMATS if (output / name).is_dir() and any((output / name).iterdir())}
    return sorted(recorded - {output} | named)


def _log_faults(path: Path) -> Iterator[str]:
    with storage_errors(path):
        lines = path.read_bytes().split(b"\n")
    if lines.pop():
        yield f"{path}: its last line is cut off; the run's own command cuts it away"
    for number, line in enumerate(lines, 1):
        try:
            json.loads(line)
        except (ValueError, RecursionError):
            yield f"{path}: line {number} is no JSON; delete the line"
