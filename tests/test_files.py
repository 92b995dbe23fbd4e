"""Files that appear whole, lines that are there once written, and operating-system errors in one line."""

import errno
import hashlib
import json
import os
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import xxhash

from shardq import files
from shardq.errors import StorageError
from shardq.formats.checkpoint import companions
from shardq.formats.shards import open_index, read_header
from shardq.formats.tensor_file import read_tensors, write_tensors


def message_of(call: Callable, *arguments: object) -> str:
    with pytest.raises(StorageError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_text_is_written_as_utf8(tmp_path):
    files.write_text(tmp_path / "a.txt", "né\n")
    assert (tmp_path / "a.txt").read_bytes() == b"n\xc3\xa9\n"


def test_equal_values_give_equal_json(tmp_path):
    files.write_json(tmp_path / "a.json", {"b": [1, 2.5, None], "a": {"y": True, "x": "é"}})
    files.write_json(tmp_path / "b.json", {"a": {"x": "é", "y": True}, "b": [1, 2.5, None]})
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert json.loads((tmp_path / "a.json").read_text()) == {"b": [1, 2.5, None], "a": {"y": True, "x": "é"}}


def test_missing_folders_are_made(tmp_path):
    files.write_text(tmp_path / "a" / "b" / "c.txt", "text")
    assert (tmp_path / "a" / "b" / "c.txt").read_text() == "text"


def test_new_file_takes_the_old_ones_place(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("a long old text")
    files.write_text(path, "new")
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_old_file_is_there_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    seen = []

    def write(aside: Path) -> None:
        aside.write_text("half")
        seen.append((aside.parent, path.read_text()))
        aside.write_text("whole")

    files.write_whole(path, write)
    assert seen == [(tmp_path, "old")]  # aside in the same folder: a rename across file systems would not be atomic
    assert path.read_text() == "whole"


@pytest.mark.parametrize("kind", [ValueError, OSError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("old", [None, "old"])
def test_write_that_fails_half_way_changes_nothing(tmp_path, kind: type[BaseException], old: str | None):
    path = tmp_path / "a.txt"
    if old:
        path.write_text(old)

    def write(aside: Path) -> None:
        aside.write_text("half")
        raise kind("stopped")

    with pytest.raises(StorageError if kind is OSError else kind):
        files.write_whole(path, write)
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == ({"a.txt": old} if old else {})


def test_leftover_of_a_killed_process_does_not_matter(tmp_path):
    """A kill leaves what stood aside; the next write must not append to it or stumble over it."""
    asides = []
    files.write_whole(tmp_path / "a.txt", lambda aside: asides.append(aside) or aside.touch())
    asides[0].write_text("a long leftover of a process that was killed")
    files.write_text(tmp_path / "a.txt", "new")
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"a.txt": "new"}


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture(params=[0o022, 0o077, 0o002])
def umask(request) -> Iterator[int]:
    former = os.umask(request.param)
    yield request.param
    os.umask(former)


def test_mode_is_what_the_umask_leaves_however_the_file_is_written(tmp_path, umask):
    def put_another(aside: Path) -> None:
        """As safetensors does: a file for its owner alone takes the name."""
        other = aside.with_name("other")
        os.close(os.open(other, os.O_CREAT | os.O_WRONLY, 0o600))
        other.rename(aside)

    (tmp_path / "b.partial").touch(0o600)
    files.write_text(tmp_path / "a", "text")
    files.write_text(tmp_path / "b", "text")
    files.write_whole(tmp_path / "c", put_another)
    write_tensors(tmp_path / "d", {"x": torch.zeros(3)})
    assert {path.name: mode_of(path) for path in tmp_path.iterdir()} == dict.fromkeys("abcd", 0o666 & ~umask)


@contextmanager
def as_another_user() -> Iterator[None]:
    """Root may read anything: be nobody for the body."""
    own = os.geteuid()
    if own == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(own)


READERS = {
    "a.safetensors": [files.sha256_of, files.xxh128_of, read_header, read_tensors],
    "model.safetensors.index.json": [lambda path: open_index(path.parent)],
    "LICENSE": [lambda path: companions(path.parent)],
}


@pytest.mark.parametrize("name, read", [(name, read) for name, readers in READERS.items() for read in readers])
def test_file_that_is_not_ours_to_read_is_told_as_that(tmp_path, name: str, read: Callable):
    path = tmp_path / name
    write_tensors(path, {"x": torch.zeros(3)})
    path.chmod(0)
    for folder in (tmp_path, *tmp_path.parents):
        if "pytest" in str(folder):  # its own are for its user alone
            folder.chmod(0o755)
    with as_another_user():
        message = message_of(read, path)
    assert message.startswith(f"{path}: cannot be read by this user; change its permissions")


def test_lines_are_appended_in_order(tmp_path):
    for line in ("first", "zwölf", "third"):
        files.append_line(tmp_path / "ledger", line)
    assert (tmp_path / "ledger").read_bytes() == "first\nzwölf\nthird\n".encode()


@pytest.mark.parametrize("size", [0, 1, 10_000_000])
def test_digest_is_that_of_the_bytes(tmp_path, size: int):
    content = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    (tmp_path / "a").write_bytes(content)
    assert files.sha256_of(tmp_path / "a") == hashlib.sha256(content).hexdigest()
    assert files.xxh128_of(tmp_path / "a") == xxhash.xxh3_128_hexdigest(content)


@pytest.mark.parametrize("digest_of", [files.sha256_of, files.xxh128_of])
def test_digest_of_a_missing_file_names_it(tmp_path, digest_of):
    message = message_of(digest_of, tmp_path / "a")
    assert message.startswith(f"{tmp_path / 'a'}: no such file")


def test_file_in_a_folders_place_is_named(tmp_path):
    (tmp_path / "a").write_text("file")
    for write in (files.write_text, files.append_line):
        assert message_of(write, tmp_path / "a" / "b", "text").startswith(f"{tmp_path / 'a' / 'b'}: ")


ADVICE = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room",
    errno.EACCES: "choose another folder",
    errno.EPERM: "choose another folder",
    errno.EROFS: "choose another folder",
    errno.EEXIST: "a file stands where a folder is to be",
    errno.ENOTDIR: "a file stands where a folder is to be",
    errno.ENOENT: "no such file",
    errno.EIO: "Input/output error; check the disk",
}


@pytest.mark.parametrize("number", ADVICE, ids=errno.errorcode.get)
def test_system_error_becomes_one_line_with_advice(tmp_path, number: int):
    path = tmp_path / "not" / "yet" / "there"
    with pytest.raises(StorageError) as caught, files.storage_errors(path):
        raise OSError(number, os.strerror(number))
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and ADVICE[number] in message and "\n" not in message
    assert caught.value.__cause__.errno == number


def test_system_error_without_a_number_keeps_its_text(tmp_path):
    with pytest.raises(StorageError, match="odd disk"), files.storage_errors(tmp_path / "a"):
        raise OSError("odd disk")


def test_other_errors_pass_unchanged(tmp_path):
    with pytest.raises(ZeroDivisionError), files.storage_errors(tmp_path / "a"):
        raise ZeroDivisionError


@pytest.fixture(name="small_disk")
def _small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 64 KiB that holds one small file."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted: {mounted.stderr.decode().strip()}")
    try:
        (folder / "a.txt").write_text("old")
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def test_full_disk_is_said_and_changes_nothing(small_disk):
    message = message_of(files.write_text, small_disk / "a.txt", "x" * 100_000)
    assert message.startswith(f"{small_disk / 'a.txt'}: no space left (0 MiB free)")
    assert {file.name: file.read_text() for file in small_disk.iterdir()} == {"a.txt": "old"}


def test_line_that_does_not_fit_is_said(small_disk):
    message = message_of(files.append_line, small_disk / "a.txt", "x" * 100_000)
    assert message.startswith(f"{small_disk / 'a.txt'}: no space left")


@pytest.mark.parametrize("write", [files.write_text, files.append_line])
@pytest.mark.parametrize("name", ["a.txt", "new.txt"])
def test_read_only_disk_is_said_and_changes_nothing(small_disk, write: Callable, name: str):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    message = message_of(write, small_disk / name, "text")
    assert message.startswith(f"{small_disk / name}: cannot be written")
    assert {file.name: file.read_text() for file in small_disk.iterdir()} == {"a.txt": "old"}


def test_folders_are_synced_into_those_above_before_what_is_in_them(tmp_path, monkeypatch):
    """A synced file in a folder whose own name is lost would be lost, too."""
    synced = []
    monkeypatch.setattr(files, "sync", lambda path: synced.append(path))
    files.make_folder(tmp_path / "a" / "b")
    files.make_folder(tmp_path / "a" / "b")
    assert synced == [tmp_path, tmp_path / "a"] and (tmp_path / "a" / "b").is_dir()


def test_new_files_name_is_synced_with_its_first_line(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(files, "sync", lambda path: synced.append(path))
    files.append_line(tmp_path / "ledger", "line")
    assert synced == [tmp_path]


def test_what_dead_processes_left_half_written_is_removed(tmp_path):
    files.write_text(tmp_path / "a" / "whole.txt", "text")
    for name in ("x.partial", "a/b.safetensors.partial"):
        (tmp_path / name).write_text("half")
    files.remove_asides(tmp_path)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["whole.txt"]


def spoil(folder: Path, how: str) -> None:
    """Put at a folder's name what another user may have left there."""
    if how == "a link":
        (folder.parent / "theirs").mkdir()
        folder.symlink_to(folder.parent / "theirs")
    elif how == "a file":
        folder.touch()
    else:
        folder.mkdir()
        folder.chmod(0o777 if how == "open to all" else 0o700)
        if how == "theirs":
            os.chown(folder, 65534, 65534)


@pytest.mark.parametrize("how", ["a link", "a file", "open to all", "theirs"])
def test_temporary_folder_that_another_may_have_made_is_not_taken(tmp_path, monkeypatch, how: str):
    if how == "theirs" and os.getuid():
        pytest.skip("only root can give a folder away")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    spoil(tmp_path / f"shardq-{os.getuid()}", how)
    assert files.temporary_folder("a") is None


def test_temporary_folder_is_this_users_alone_and_found_again(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = files.temporary_folder("a")
    (folder / "x").touch()
    assert mode_of(folder.parent) == 0o700 and files.temporary_folder("a") == folder and (folder / "x").exists()


KILLED_IN_A_WRITE = """
import resource, signal, sys, torch
from safetensors.torch import save_file
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
save_file({"a": torch.zeros(10_000)}, sys.argv[1])
"""


def test_what_safetensors_left_half_written_is_removed(tmp_path):
    killed = subprocess.run([sys.executable, "-c", KILLED_IN_A_WRITE, str(tmp_path / "a.safetensors.partial")])
    assert killed.returncode == -signal.SIGXFSZ
    assert list(tmp_path.iterdir()) != []
    files.remove_asides(tmp_path)
    assert list(tmp_path.iterdir()) == []
