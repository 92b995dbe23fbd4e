"""Files that appear whole: written under a temporary name, synced, renamed."""

import errno
import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import xxhash

from shardq.errors import StorageError

ASIDE = ".partial"
SAFETENSORS_ASIDE = ".tmp??????"  # the temporary name to which the safetensors library writes before it renames


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Make `path` appear with all its bytes or not at all, readable by those whom the umask allows.

    Args:
        path: the final name; its folder is made if missing.
        write: fills or replaces the file whose name it is given.

    Raises:
        StorageError: the disk is full or read-only, or this user may not write there.
    """
    aside = path.with_name(path.name + ASIDE)
    with storage_errors(path):
        make_folder(path.parent)
        try:
            aside.unlink(missing_ok=True)  # left by a dead process, maybe with another mode
            aside.touch()
            mode = aside.stat().st_mode  # as umask and folder set it; safetensors lets only the owner read its files
            write(aside)
            if aside.stat().st_mode != mode:  # some network disks refuse any change
                aside.chmod(stat.S_IMODE(mode))
            sync(aside)
            os.replace(aside, path)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
        sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a small UTF-8 text file whole."""
    write_whole(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: object) -> None:
    """Write a JSON file whole, with sorted keys so that equal values give equal bytes."""
    write_text(path, json_text(value))


def json_text(value: object) -> str:
    """The text of a JSON file as `write_json` writes it."""
    return json.dumps(value, indent=2, sort_keys=True) + "\n"


def append_line(path: Path, line: str) -> None:
    """Append one line and sync it: once this returns, the line survives a power cut, the file's name included."""
    with storage_errors(path):
        with open(path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        sync(path.parent)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it; once this returns, they survive a power cut."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync(folder.parent)


def remove(path: Path) -> None:
    """Remove a file, if it exists; raises StorageError where that is impossible."""
    with storage_errors(path):
        path.unlink(missing_ok=True)


def remove_folder(folder: Path) -> bool:
    """Remove a folder with its content, also after a power cut; False if there was none; raises as `remove`."""
    with storage_errors(folder):
        if not folder.exists():
            return False
        shutil.rmtree(folder)
        sync(folder.parent)
        return True


def remove_asides(folder: Path) -> None:
    """Remove half-written files of dead processes in a folder and those below it."""
    for pattern in (f"*{ASIDE}", SAFETENSORS_ASIDE):
        for aside in folder.rglob(pattern):
            remove(aside)


def sync(path: Path) -> None:
    """Force a file's bytes, or a folder's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file as 64 hex digits, which identifies its content."""
    with storage_errors(path, "read"), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def xxh128_of(path: Path) -> str:
    """XXH3 of 128 bits of a file as 32 hex digits, which shows damage: faster than a disk, as SHA-256 is not."""
    with storage_errors(path, "read"), open(path, "rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def nearest_folder(folder: Path) -> Path:
    """A folder, or the nearest one above it that exists."""
    return next(place for place in (folder.absolute(), *folder.absolute().parents) if place.is_dir())


def can_be_written(folder: Path) -> bool:
    """Whether files can be made in a folder, which is created if it is missing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def temporary_folder(name: str) -> Path | None:
    """A folder of this user below the system's temporary one, which may be gone tomorrow; None if there can be none.

    Anyone may write to the temporary folder, so an existing folder of that name is used only if no one else can write
    to it.
    """
    try:
        folder = Path(tempfile.gettempdir(), f"shardq-{os.getuid()}")
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    except OSError:
        return None
    is_ours = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022
    return folder / name if is_ours and can_be_written(folder / name) else None


@contextmanager
def storage_errors(path: Path, doing: Literal["write", "read"] = "write") -> Iterator[None]:
    """Turn an operating-system error on `path` into one line that says what to do."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"{path}: {_advice(error, path, doing)}") from error


def _advice(error: OSError, path: Path, doing: Literal["write", "read"]) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space left ({_free_mib(path)} MiB free); make room and run the same command again"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        if doing == "read":
            return "cannot be read by this user; change its permissions, or those of its folder"
        return "cannot be written; choose another folder or change its permissions"
    if error.errno in (errno.EEXIST, errno.ENOTDIR):
        return "a file stands where a folder is to be; choose another folder or move that file away"
    if error.errno == errno.ENOENT:
        return "no such file or folder; check the path"
    return f"{error.strerror or error}; check the disk and run the same command again"


def _free_mib(path: Path) -> int:
    return shutil.disk_usage(nearest_folder(path.parent)).free >> 20
