"""What a run is (manifest.json) and what it has finished (ledger.jsonl).

A block counts as finished once its ledger line, with the digests of its files, is on the disk; that line is written
after the files themselves. A line of another kind begins a redo: its blocks count no longer, and from there on the
manifest is the one that it holds. The line that completes a run has all files beside the blocks, the manifest as well.
Both files depend on the run's inputs alone: no times, no paths of the output.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import xxhash

from shardq.errors import ResumeError
from shardq.files import ASIDE, append_line, json_text, write_json, write_text
from shardq.formats.sealed import SEAL, sealed, unsealed
from shardq.parallel.collectives import TOKEN
from shardq.rundir.digests import changed_files, cut_torn_line, digest_of, entry_of
from shardq.rundir.folder import LOCK, MANIFEST, RunFolder
from shardq.rundir.manifest import REDO_MAY_CHANGE, differences

Entries = dict[int | None, dict]
"""Ledger lines by the block that each is about; None: about the files that complete the run."""


def stored_options(output: Path, section: str) -> dict:
    """Options of the run in a folder, empty where there is no run, or its manifest is not what it was at the end."""
    path, lines = RunFolder(output).manifest, read_lines(output)
    if not path.exists() or not (redo_lines(lines) or _is_manifest_whole(output, lines)):
        return {}
    try:
        return read_manifest(output)["options"].get(section, {})
    except (KeyError, AttributeError) as error:
        raise ResumeError(f"{path}: damaged (it holds no options); choose another --output") from error


def read_manifest(output: Path) -> dict:
    """What the run in a folder is: as it began, or since its last redo."""
    redos = redo_lines(read_lines(output))
    return redos[-1]["manifest"] if redos else read_json(RunFolder(output).manifest)


def check_folder(output: Path, resume: str) -> None:
    """Check that a folder is one to begin or to go on in, without changing it.

    Raises:
        ResumeError: it holds something else, or nothing to go on with.
    """
    folder = RunFolder(output)
    if folder.is_taken:
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

    A finished run's files are checked by name and size, the small ones by digest; those of other runs by digest.

    Args:
        redo: blocks to do again.

    Returns:
        The ledger's lines, none for a new run; and the line, if there is to be one, that begins a redo. `begin_run`,
        appending that line and mending what completes a finished run are left to the caller.

    Raises:
        ResumeError: the folder holds something else, another run, or files that are not what the ledger says.
    """
    check_folder(output, resume)
    folder = RunFolder(output)
    if not folder.is_taken:
        if redo is not None:
            raise ResumeError(f"{output}: no run to redo blocks of (no {MANIFEST}); check --output or drop --redo")
        return [], None
    if not folder.manifest.exists():
        raise ResumeError(f"{folder.manifest}: missing; restore it, or give the options that the run was made with")
    if resume == "never":
        raise ResumeError(f"{output}: already holds a run and --resume is never; choose another --output or delete it")
    cut_torn_line(folder.ledger)
    lines, differing = read_lines(output), differences(read_manifest(output), manifest)
    lasting = [text for name, text in differing.items() if redo is None or not name.startswith(REDO_MAY_CHANGE)]
    if lasting:
        raise ResumeError(
            f"{output}: belongs to another run; different: {'; '.join(lasting)}; choose another --output or the same "
            "options"
        )
    entries = finished(lines)
    is_quick = None in entries and redo is None  # nothing is made from these files
    damaged = {block: fault for block, _, fault in damaged_files(output, entries, is_quick)}
    line = None if redo is None else _redo_line(lines, redo, manifest, damaged)
    left = [block for block in damaged if block in finished([*lines, *([line] if line else [])])]
    if redo is None and left == [None]:
        return lines, line  # what completes a run is written again from the source
    if left:
        numbers = ",".join("end" if block is None else str(block) for block in damaged)
        raise ResumeError(f"{damaged[left[0]]}; restore it, or do it again with --redo {numbers}")
    return lines, line


def begin_run(output: Path, manifest: dict) -> None:
    """Make a folder a run's, if it is none yet."""
    path = RunFolder(output).manifest
    if not path.exists():
        write_json(path, manifest)


def mend_manifest(output: Path, manifest: dict, say: Callable[[str], None]) -> None:
    """Write a finished run's manifest again where it is not what it was, and the one at hand is.

    Args:
        say: is given a line where that was done.
    """
    path, lines, text = RunFolder(output).manifest, read_lines(output), json_text(manifest)
    if not _is_manifest_whole(output, lines) and xxhash.xxh3_128_hexdigest(text.encode()) == _manifest_digest(lines):
        write_text(path, text)
        say(f"{path}: missing or changed since the run was finished; written again")


def _is_manifest_whole(output: Path, lines: list[dict]) -> bool:
    """Whether the manifest of a finished run is what it was; of another run that is not known, and assumed."""
    path, recorded = RunFolder(output).manifest, _manifest_digest(lines)
    return recorded is None or (path.is_file() and digest_of(path, recorded) == recorded)


def _manifest_digest(lines: list[dict]) -> str | None:
    return finished(lines).get(None, {}).get("files", {}).get(MANIFEST)


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
    for fault in why_unfinished(output, entries):
        raise ResumeError(fault)
    for _, _, fault in damaged_files(output, entries):
        raise ResumeError(f"{fault}; restore it, or run its command again, which says how to mend it")


def why_unfinished(output: Path, entries: Entries) -> list[str]:
    """One line where a run is not finished."""
    if None in entries:
        return []
    if not RunFolder(output).manifest.exists():
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
    path, lines, sealing = RunFolder(output).ledger, [], False
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
    """What is wrong with a line after those whose entries count; nothing if it may stand there."""
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


def damaged_files(output: Path, entries: Entries, is_quick: bool = False) -> Iterator[tuple[int | None, Path, str]]:
    """The block, the path, and a line about it, of each file of the ledger's that is not what it was when it was done.

    Args:
        is_quick: whether larger files are compared by their size alone.
    """
    for block, entry in entries.items():
        for path, fault in changed_files(output, entry, is_quick):
            yield block, path, fault


def blocks_digest(entries: Entries) -> str:
    """What tells the blocks of a finished run from others: a digest of their files' digests."""
    digests = [entries[block]["files"] for block in sorted(entries.keys() - {None})]
    return xxhash.xxh3_128_hexdigest(json.dumps(digests, sort_keys=True).encode())


def commit(output: Path, block: int | None, files: list[Path], **facts: object) -> dict:
    """Append the ledger line that makes a block's files count, and give it; `block` None: the whole run is complete."""
    like = next((digest for line in read_lines(output) for digest in line.get("files", {}).values()), None)
    return append(output, {"block": block, **entry_of(output, files, like), **facts})


def complete(output: Path, files: list[Path]) -> dict:
    """Append the line that completes a run, once its manifest is the one that counts; give it."""
    path = RunFolder(output).manifest
    write_json(path, read_manifest(output))
    return commit(output, None, [*files, path])


def append(output: Path, line: dict) -> dict:
    """Append a line to the ledger; give it as it will be read."""
    append_line(RunFolder(output).ledger, json.dumps(sealed(line), sort_keys=True))
    return json.loads(json.dumps(line))
