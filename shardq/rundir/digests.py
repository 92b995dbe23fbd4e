"""Digests and sizes of finished files, and the check that the files still have them."""

import os
from collections.abc import Iterator
from pathlib import Path

from shardq.files import storage_errors, xxh128_of

SMALL_BYTES = 16 << 20  # files up to this size are read by a quick check too


def changed_files(folder: Path, entry: dict, is_quick: bool = False) -> Iterator[tuple[Path, str]]:
    """The path, and a line about it, of each file that differs from an entry's `files` and `bytes`.

    Args:
        entry: an entry of a ledger, or an export's record; sizes may be missing.
        is_quick: whether larger files are compared only by their size.
    """
    for name, digest in entry["files"].items():
        path, num_bytes = folder / name, entry.get("bytes", {}).get(name)
        with storage_errors(path):
            found = path.stat().st_size if path.is_file() else None
        if found is None:
            yield path, f"{path}: missing although it was finished"
        elif num_bytes is not None and found != num_bytes:
            yield path, f"{path}: changed since it was finished ({found} bytes, it had {num_bytes})"
        elif (found <= SMALL_BYTES or not is_quick) and xxh128_of(path) != digest:
            yield path, f"{path}: changed since it was finished (its digest differs)"


def entry_of(folder: Path, files: list[Path]) -> dict:
    """Digests and sizes of files, by their names in a folder."""
    names = {str(path.relative_to(folder)): path for path in files}
    return {
        "files": {name: xxh128_of(path) for name, path in names.items()},
        "bytes": {name: path.stat().st_size for name, path in names.items()},
    }


def cut_torn_line(path: Path) -> None:
    """Cut off an incomplete last line, left by a kill during an append, so that the next append begins a line."""
    content = path.read_bytes() if path.exists() else b""
    if not content.endswith(b"\n") and content:
        os.truncate(path, content.rfind(b"\n") + 1)
