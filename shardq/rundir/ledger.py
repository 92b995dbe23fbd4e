"""What a run is (manifest.json) and what it has finished (ledger.jsonl).

A block counts as finished once its ledger line, with the digests of its files, is on the disk; that line is written
after the files. A line of another kind begins a redo: the blocks that it names no longer count, and from there on the
manifest in that line is the run's. The line that completes a run has all other files, the manifest included. Both files
depend only on the run's inputs: no times, no paths of the output.
"""

import json
from pathlib import Path

from shardq.errors import ResumeError
from shardq.files import append_line, write_json
from shardq.formats.sealed import SEAL, sealed, unsealed
from shardq.rundir.digests import entry_of
from shardq.rundir.folder import RunFolder

Entries = dict[int | None, dict]
"""Ledger lines by the number of their block; None: the line about the files that complete the run."""


def begin_run(output: Path, manifest: dict) -> None:
    """Make a folder that of a run, unless a run has begun there."""
    path = RunFolder(output).manifest
    if not path.exists():
        write_json(path, manifest)


def read_json(path: Path) -> dict:
    """A JSON object of a run.

    Raises:
        ResumeError: it is damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("no JSON object")
        return content
    except (ValueError, RecursionError) as error:
        raise ResumeError(f"{path}: damaged ({error}); choose another --output") from error


def read_lines(output: Path) -> list[dict]:
    """The ledger's whole lines; a kill inside an append leaves a line without its end, which was never committed.

    Raises:
        ResumeError: a line is damaged or out of order.
    """
    lines: list[dict] = []
    path, sealing = RunFolder(output).ledger, False
    for number, text in enumerate(path.read_bytes().split(b"\n")[:-1] if path.exists() else []):
        try:
            line = json.loads(text)
            # Lines of runs begun before they were sealed have no sizes of files either.
            sealing = isinstance(line, dict) and (sealing or not line.keys().isdisjoint((SEAL, "bytes")))
            if sealing and SEAL not in line:
                raise ValueError("no seal")
            line = unsealed(line) if sealing else line
        except (ValueError, RecursionError):
            line = None
        fault = _fault(line, finished(lines))
        if fault:
            raise ResumeError(f"{path}: line {number + 1} {fault}; choose another --output")
        lines.append(line)
    return lines


def _fault(line: object, before: Entries) -> str:
    """The fault of a line after the entries `before`, in words; empty if the line is valid there."""
    damaged = "is damaged"
    if not isinstance(line, dict):
        return damaged
    if "redo" in line:
        redo, manifest = line["redo"], line.get("manifest")
        numbers = isinstance(redo, list) and all(type(block) is int for block in redo)
        return "" if numbers and isinstance(manifest, dict) else damaged
    if "block" not in line or not (isinstance(line.get("files"), dict) and isinstance(line.get("bytes", {}), dict)):
        return damaged
    if not isinstance(line.get("source", {}), dict):
        return damaged
    block, expected = line["block"], blocks_to_do(before, len(before) + 1).start
    if None in before:
        return f"is about block {block} although the run was complete"
    if block != expected and not (block is None and expected == len(before)):
        return f"is about block {block}, not {expected}"
    if any(Path(name).is_absolute() or ".." in Path(name).parts for name in line["files"]):
        return "names a file outside the folder"
    return ""


def manifest_of(output: Path, lines: list[dict]) -> dict:
    """The manifest of the run in a folder: that of its beginning, or of the last redo among its ledger's lines."""
    redos = redo_lines(lines)
    return redos[-1]["manifest"] if redos else read_json(RunFolder(output).manifest)


def redo_lines(lines: list[dict]) -> list[dict]:
    """The lines that begin a redo."""
    return [line for line in lines if "redo" in line]


def finished(lines: list[dict]) -> Entries:
    """The entries that count.

    A redo takes out its blocks, and the completion. One of them that comes out with other bytes takes out all blocks
    after it, as they were made for the former one; with the same bytes it leaves them as they are.
    """
    counting: Entries = {}
    former: Entries = {}
    for line in lines:
        if "redo" in line:
            counting = {block: entry for block, entry in counting.items() if block not in (*line["redo"], None)}
            continue
        block = line["block"]
        if block is not None and block in former and former[block]["files"] != line["files"]:
            counting = {other: entry for other, entry in counting.items() if other < block}
        counting[block] = former[block] = line
    return counting


def blocks_to_do(entries: Entries, num_blocks: int) -> range:
    """The first blocks that are not finished, up to the next one that is; empty at `num_blocks` if all are."""
    first = next((block for block in range(num_blocks) if block not in entries), num_blocks)
    return range(first, next((block for block in range(first, num_blocks) if block in entries), num_blocks))


def commit(output: Path, block: int | None, files: list[Path], **facts: object) -> dict:
    """Append the ledger line that makes a block's files count, and give it; `block` None: the whole run is complete."""
    return append(output, {"block": block, **entry_of(output, files), **facts})


def complete(output: Path, files: list[Path]) -> dict:
    """Append the line that completes a run, once its manifest is the one that counts; give it."""
    path = RunFolder(output).manifest
    write_json(path, manifest_of(output, read_lines(output)))
    return commit(output, None, [*files, path])


def append(output: Path, line: dict) -> dict:
    """Append a line to the ledger; give it as it will be read."""
    append_line(RunFolder(output).ledger, json.dumps(sealed(line), sort_keys=True))
    return json.loads(json.dumps(line))
