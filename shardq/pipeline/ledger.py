"""What a run is (manifest.json) and what it has finished (ledger.jsonl).

A block counts as finished once its ledger line, with the digests of its files, is on the disk; that line is written
after the files themselves. Both files depend on the run's inputs alone: no times, no paths of the output.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from shardq import __version__
from shardq.config import QuantizeConfig
from shardq.errors import ResumeError
from shardq.files import ASIDE, append_line, sha256_of, storage_errors, write_json
from shardq.formats.shards import Index, read_sample
from shardq.pipeline.lock import LOCK

MANIFEST, LEDGER = "manifest.json", "ledger.jsonl"
# May differ when a run goes on.
NOT_PART_OF_A_RUN = ("model", "output", "resume", "device", "cache", "checkpoint", "parallel")


def make_manifest(config: QuantizeConfig, index: Index, folder: Path, tokens_digest: str) -> dict:
    """Everything that decides a run's result, but for the last bits that depend on ranks and engine."""
    options = {name: value for name, value in asdict(config).items() if name not in NOT_PART_OF_A_RUN}
    del options["optimize"]["memory_gib"]  # decides the micro-batch, nothing else
    del options["export"]["formats"]  # may be written at any time
    if not config.activations.asked:
        del options["activations"]  # the others decide nothing then
    manifest = {
        "shardq": __version__,
        "model": {"config": sha256_of(folder / "config.json"), "weights": _fingerprint(index)},
        "calibration_tokens": tokens_digest,
        "options": options,
    }
    return json.loads(json.dumps(manifest))  # as it will be read back: tuples are lists


def _fingerprint(index: Index) -> str:
    """Digest over every tensor's name, place, shape, dtype and 4 KiB from its middle.

    Hashing all bytes of a 70B model would take minutes at every start; a retrained or another model differs here too.
    """
    digest = hashlib.sha256()
    for info in index.values():
        digest.update(repr((info.name, info.file.name, info.dtype, info.shape, info.offset)).encode())
        digest.update(read_sample(info))
    return digest.hexdigest()


def differences(stored: object, current: object, path: str = "") -> list[str]:
    """Dotted names, with both values, of what differs between two manifests."""
    if isinstance(stored, dict) and isinstance(current, dict):
        names = sorted(stored.keys() | current.keys())
        return [
            line
            for name in names
            for line in differences(stored.get(name), current.get(name), f"{path}.{name}" if path else name)
        ]
    return (
        [] if stored == current else [f"{path.removeprefix('options.')} (was {_short(stored)}, is {_short(current)})"]
    )


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:12] + "..."


def stored_options(output: Path, section: str) -> dict:
    """Options of the run in a folder, empty where there is no run."""
    if not (output / MANIFEST).exists():
        return {}
    try:
        return read_manifest(output)["options"].get(section, {})
    except (KeyError, AttributeError) as error:
        raise ResumeError(f"{output / MANIFEST}: damaged (it holds no options); choose another --output") from error


def read_manifest(output: Path) -> dict:
    """What the run in a folder is."""
    return read_json(output / MANIFEST)


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
    # The aside file is what a kill inside the writing of the manifest itself leaves.
    if output.exists() and any(file.name not in (LOCK, MANIFEST + ASIDE) for file in output.iterdir()):
        raise ResumeError(f"{output}: not empty and not a run of shardq; choose another --output")


def open_run(output: Path, manifest: dict, resume: str) -> list[dict]:
    """Begin a run in a folder, or find what an unfinished run there has done.

    Returns:
        The ledger's entries, one a finished block and a last one once the run is complete; empty for a new run.

    Raises:
        ResumeError: the folder holds something else, another run, or files that are not what the ledger says.
    """
    check_folder(output, resume)
    path = output / MANIFEST
    if not path.exists():
        write_json(path, manifest)
        return []
    if resume == "never":
        raise ResumeError(f"{output}: already holds a run and --resume is never; choose another --output or delete it")
    differing = differences(read_json(path), manifest)
    if differing:
        raise ResumeError(
            f"{output}: belongs to another run; different: {'; '.join(differing)}; choose another --output or the "
            "same options"
        )
    _cut_torn_line(output)
    return _read_ledger(output)


def check_finished(output: Path) -> None:
    """Check that a folder holds a finished run whose files are what its ledger says.

    Raises:
        ResumeError: it does not.
    """
    entries = _read_ledger(output)
    if not entries or entries[-1]["block"] is not None:
        raise ResumeError(f"{output}: holds no finished run; run the command that began it to its end")


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


def _read_ledger(output: Path) -> list[dict]:
    entries = read_entries(output)
    for fault in damaged_files(output, entries):
        raise ResumeError(f"{fault}; restore it or start anew")
    return entries


def read_entries(output: Path) -> list[dict]:
    """The ledger's whole lines; a kill inside an append leaves a line without its end, which was never committed.

    Raises:
        ResumeError: a line is damaged or out of order.
    """
    path, entries = output / LEDGER, []
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    for number, line in enumerate(lines):
        try:
            entry = json.loads(line)
            block, names = entry["block"], [Path(name) for name in entry["files"].keys()]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ResumeError(f"{path}: line {number + 1} is damaged; choose another --output") from error
        if block != number and not (block is None and number == len(lines) - 1):
            raise ResumeError(
                f"{path}: line {number + 1} is about block {block}, not {number}; choose another --output"
            )
        if any(name.is_absolute() or ".." in name.parts for name in names):
            raise ResumeError(f"{path}: line {number + 1} names a file outside the folder; choose another --output")
        entries.append(entry)
    return entries


def damaged_files(output: Path, entries: list[dict]) -> Iterator[str]:
    """One line for each file of the ledger's that is not what it was when it was finished."""
    for entry in entries:
        for name, digest in entry["files"].items():
            path = output / name
            with storage_errors(path):
                is_there = path.is_file()
            if not is_there:
                yield f"{path}: missing although the ledger has it as finished"
            elif sha256_of(path) != digest:
                yield f"{path}: changed since it was finished (its digest differs)"


def _cut_torn_line(output: Path) -> None:
    """Cut off what a kill inside an append has left, so that the next line begins a line."""
    path = output / LEDGER
    content = path.read_bytes() if path.exists() else b""
    if not content.endswith(b"\n") and content:
        os.truncate(path, content.rfind(b"\n") + 1)


def commit(output: Path, block: int | None, files: list[Path], **facts: object) -> None:
    """Append the ledger line that makes a block's files count; `block` None: the whole run is complete."""
    digests = {str(path.relative_to(output)): sha256_of(path) for path in files}
    append_line(output / LEDGER, json.dumps({"block": block, "files": digests, **facts}, sort_keys=True))
