"""The record in an export's folder: written first to claim the folder, and last to say that the export is complete."""

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from shardq.config import ExportConfig
from shardq.errors import ConfigError, ResumeError, StorageError
from shardq.export.chosen import format_of
from shardq.files import ASIDE, remove, write_json
from shardq.formats.sealed import SEAL, sealed, unsealed
from shardq.rundir.digests import changed_files, entry_of
from shardq.rundir.folder import LOCK

RECORD = "shardq-export.json"


def check_place(folder: Path) -> None:
    """Check that a folder is free for an export, or holds one.

    Raises:
        ConfigError: it is a file, or holds something else.
    """
    if not folder.exists() or (folder / RECORD).exists():
        return
    if not folder.is_dir() or any(path.name not in (LOCK, RECORD + ASIDE) for path in folder.iterdir()):
        raise ConfigError(
            f"output: {folder} is not an empty folder, nor one that holds an export (no {RECORD}); choose another or "
            "delete it"
        )


def begin(config: ExportConfig, blocks: str) -> None:
    """Write the record that claims the folder, before any other file.

    Args:
        blocks: digest of the run's blocks.
    """
    write_json(config.folder / RECORD, sealed(_asked(config) | {"run": blocks}))


def finish(config: ExportConfig, blocks: str, scale_change: float) -> dict:
    """Write the record of the complete export, with digests and sizes of all files, and return it."""
    folder = config.folder
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in (RECORD, LOCK))
    record = _asked(config) | {"run": blocks, "scale_change": scale_change} | entry_of(folder, files)
    write_json(folder / RECORD, sealed(record))
    return record


def read(folder: Path) -> dict | None:
    """The record of an export, or None if there is none; that of an interrupted export has no `files`.

    Raises:
        ResumeError: the record is damaged.
    """
    path = folder / RECORD
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if SEAL not in record:
            raise ValueError("it has no seal")
        return unsealed(record)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ResumeError(f"{path}: damaged ({error}); delete {folder} and export again") from error


def is_of_other_options(config: ExportConfig, record: dict) -> bool:
    """Whether a record is of another format, or of the same one with other options."""
    asked = _asked(config)
    return any(record.get(name) != value for name, value in asked.items())


def options_of(record: dict) -> str:
    """A record's format and options, for people."""
    options = ", ".join(f"{name} {value}" for name, value in record["options"].items())
    return f"{record['format']}{f' ({options})' if options else ''}"


def why_unfinished(config: ExportConfig, record: dict | None, blocks: str) -> str:
    """Why an export has to be written, with its folder; empty if it exists as it was asked for."""
    if record is None:
        return f"{config.folder}: not there yet"
    if is_of_other_options(config, record):
        return f"{config.folder}: is {options_of(record)}"
    if "files" not in record:
        return f"{config.folder}: an export that was cut short"
    if record["run"] != blocks:
        return f"{config.folder}: the run has changed since it was exported"
    return next((fault for _, fault in changed_files(config.folder, record, is_quick=True)), "")


def abandon(folder: Path) -> None:
    """Remove the record of an export that has begun, if no other file of it exists; the disk may be the reason."""
    with suppress(OSError, StorageError):
        if all(path.name in (RECORD, LOCK) for path in folder.iterdir()):
            remove(folder / RECORD)


def remove_former(folder: Path, record: dict | None) -> None:
    """Remove a former export's files by its record, after the record has been replaced by an unfinished one."""
    for name in (record or {}).get("files", {}):
        remove(folder / name)


def faults(folder: Path, record: dict, blocks: str | None = None) -> Iterator[str]:
    """Changes of an export since it was finished, one line a fault; every byte is read.

    Args:
        blocks: digest of the run's blocks, if it is known.
    """
    if "files" not in record:
        yield f"{folder}: an export that was cut short; export again"
        return
    if blocks is not None and record["run"] != blocks:
        yield f"{folder}: the run has changed since it was exported; export again"
    yield from (fault for _, fault in changed_files(folder, record))
    for path in sorted(folder.rglob("*")):
        if not path.is_dir() and str(path.relative_to(folder)) not in (RECORD, LOCK, *record["files"]):
            yield f"{path}: no file of this export; move it elsewhere"


def _asked(config: ExportConfig) -> dict:
    """The format and its own options; a run's configuration has values for the options of all formats."""
    return {"format": config.format, "options": format_of(config.format, config).options}
