"""What a run is (manifest.json) and what it has finished (ledger.jsonl).

A block counts as finished once its ledger line, with the digests of its files, is on the disk; that line is written
after the files themselves. A line of another kind begins a redo: its blocks count no longer, and from there on the
manifest is the one that it holds. Both files depend on the run's inputs alone: no times, no paths of the output.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path

from shardq.errors import ResumeError
from shardq.files import ASIDE, append_line, sha256_of, storage_errors, write_json, xxh128_of
from shardq.parallel.collectives import TOKEN
from shardq.pipeline.lock import LOCK
from shardq.pipeline.manifest import REDO_MAY_CHANGE, differences

MANIFEST, LEDGER = "manifest.json", "ledger.jsonl"
SHA256_DIGITS = 64  # runs begun before digests were XXH3 have these
Entries = dict[int | None, dict]
"""Ledger lines by the block that each is about; None: about the files that complete the run."""


def stored_options(output: Path, section: str) -> dict:
    """Options of the run in a folder, empty where there is no run."""
    if not (output / MANIFEST).exists():
        return {}
    try:
        return read_manifest(output)["options"].get(section, {})
    except (KeyError, AttributeError) as error:
        raise ResumeError(f"{output / MANIFEST}: damaged (it holds no options); choose another --output") from error


def read_manifest(output: Path) -> dict:
    """What the run in a folder is: as it began, or since its last redo."""
    redos = redo_lines(read_lines(output))
    return redos[-1]["manifest"] if redos else read_json(output / MANIFEST)


def check_folder(output: Path, resume: str) -> None:
    """Check that a folder is one to begin or to go on in, without changing it.

    Raises:
        ResumeError: it holds something else, or nothing to go on with.
    """
    if (output / MANIFEST).exists():
        return
    if resume == "require":
        raise ResumeError(f"{output}: no run to resume here (no {MANIFEST}); check --output or drop --resume require")
    if output.exists() and not output.is_dir():
        raise ResumeError(f"{output}: is a file; choose another --output")
    # What a kill before or inside the writing of the manifest leaves.
    begun = (LOCK, MANIFEST + ASIDE, TOKEN, TOKEN + ASIDE)
    if output.exists() and any(not any(map(file.match, begun)) for file in output.iterdir()):
        raise ResumeError(f"{output}: not empty and not a run of shardq; choose another --output")


def open_run(
    output: Path, manifest: dict, resume: str, redo: list[int] | None = None
) -> tuple[list[dict], dict | None]:
    """Find what the run in a folder has done, or that one may begin there.

    Args:
        redo: blocks to do again.

    Returns:
        The ledger's lines, none for a new run; and the line, if there is to be one, that begins a redo. `begin_run`
        and appending that line are left to the caller.

    Raises:
        ResumeError: the folder holds something else, another run, or files that are not what the ledger says.
    """
    check_folder(output, resume)
    if not (output / MANIFEST).exists():
        if redo is not None:
            raise ResumeError(f"{output}: no run to redo blocks of (no {MANIFEST}); check --output or drop --redo")
        return [], None
    if resume == "never":
        raise ResumeError(f"{output}: already holds a run and --resume is never; choose another --output or delete it")
    _cut_torn_line(output)
    lines, differing = read_lines(output), differences(read_manifest(output), manifest)
    lasting = [text for name, text in differing.items() if redo is None or not name.startswith(REDO_MAY_CHANGE)]
    if lasting:
        raise ResumeError(
            f"{output}: belongs to another run; different: {'; '.join(lasting)}; choose another --output or the same "
            "options"
        )
    entries = finished(lines)
    damaged = dict(damaged_files(output, entries))
    line = None if redo is None else _redo_line(lines, redo, manifest, damaged)
    left = [block for block in damaged if block in finished([*lines, *([line] if line else [])])]
    if left:
        numbers = ",".join("end" if block is None else str(block) for block in damaged)
        raise ResumeError(f"{damaged[left[0]]}; restore it, or do it again with --redo {numbers}")
    return lines, line


def begin_run(output: Path, manifest: dict) -> None:
    """Make a folder a run's, if it is none yet."""
    if not (output / MANIFEST).exists():
        write_json(output / MANIFEST, manifest)


def _redo_line(lines: list[dict], redo: list[int], manifest: dict, damaged: dict[int | None, str]) -> dict | None:
    """What begins a redo; None where the last one has asked for the same, and nothing of it is damaged since."""
    for last in redo_lines(lines)[-1:]:
        is_same = last["redo"] == redo and not differences(last["manifest"], manifest)
        if is_same and not damaged.keys() & {*redo, None}:
            return None
    return {"redo": redo, "manifest": manifest}


def check_finished(output: Path) -> None:
    """Check that a folder holds a finished run whose files are what its ledger says.

    Raises:
        ResumeError: it does not.
    """
    entries = finished(read_lines(output))
    for fault in (*why_unfinished(output, entries), *dict(damaged_files(output, entries)).values()):
        raise ResumeError(fault)


def why_unfinished(output: Path, entries: Entries) -> list[str]:
    """One line where a run is not finished."""
    if None in entries:
        return []
    if not (output / MANIFEST).exists():
        what = f"holds no run of shardq (no {MANIFEST})" if output.exists() else "no such folder"
        return [f"{output}: {what}; check the path"]
    return [f"{output}: not finished, {len(entries)} block(s) are; run its command again, which goes on after them"]


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
    path, lines = output / LEDGER, []
    for number, text in enumerate(path.read_bytes().split(b"\n")[:-1] if path.exists() else []):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            line = None
        fault = _fault(line, finished(lines))
        if fault:
            raise ResumeError(f"{path}: line {number + 1} {fault}; choose another --output")
        lines.append(line)
    return lines


def _fault(line: object, before: Entries) -> str:
    """What is wrong with a line after those whose entries count; nothing if it may stand there."""
    damaged = "is damaged"
    if not isinstance(line, dict):
        return damaged
    if "redo" in line:
        redo, manifest = line["redo"], line.get("manifest")
        numbers = isinstance(redo, list) and all(type(block) is int for block in redo)
        return "" if numbers and isinstance(manifest, dict) else damaged
    if "block" not in line or not isinstance(line.get("files"), dict):
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


def damaged_files(output: Path, entries: Entries) -> Iterator[tuple[int | None, str]]:
    """The block, and a line about it, of each file of the ledger's that is not what it was when it was finished."""
    for block, entry in entries.items():
        for name, digest in entry["files"].items():
            path = output / name
            with storage_errors(path):
                is_there = path.is_file()
            if not is_there:
                yield block, f"{path}: missing although the ledger has it as finished"
            elif _digest(path, digest) != digest:
                yield block, f"{path}: changed since it was finished (its digest differs)"


def _cut_torn_line(output: Path) -> None:
    """Cut off what a kill inside an append has left, so that the next line begins a line."""
    path = output / LEDGER
    content = path.read_bytes() if path.exists() else b""
    if not content.endswith(b"\n") and content:
        os.truncate(path, content.rfind(b"\n") + 1)


def commit(output: Path, block: int | None, files: list[Path], **facts: object) -> dict:
    """Append the ledger line that makes a block's files count, and give it; `block` None: the whole run is complete."""
    like = next((digest for line in read_lines(output) for digest in line.get("files", {}).values()), None)
    digests = {str(path.relative_to(output)): _digest(path, like) for path in files}
    return append(output, {"block": block, "files": digests, **facts})


def _digest(path: Path, like: object) -> str:
    """Digest of a file, of the kind of `like`: a run that began with SHA-256 has no other to its end."""
    return sha256_of(path) if isinstance(like, str) and len(like) == SHA256_DIGITS else xxh128_of(path)


def append(output: Path, line: dict) -> dict:
    """Append a line to the ledger; give it as it will be read."""
    text = json.dumps(line, sort_keys=True)
    append_line(output / LEDGER, text)
    return json.loads(text)
