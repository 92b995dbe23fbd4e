"""One run at a time in a folder; a lock whose holder is gone holds nobody up."""

import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shardq.errors import ResumeError, StorageError
from shardq.rundir.folder import LOCK
from shardq.rundir.lock import only_run

HOLD = """
import sys, time
from pathlib import Path
from shardq.rundir.lock import only_run
with only_run(Path(sys.argv[1]), print):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path):
    """Another process that holds the lock of `tmp_path / "out"`."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_second_run_is_refused_with_process_host_and_time(holder, tmp_path: Path):
    with pytest.raises(ResumeError) as caught, only_run(tmp_path / "out", print):
        pass
    host = re.escape(socket.gethostname())
    begun = time.strftime("%Y-%m-%d", time.gmtime())
    assert re.search(rf"out: process {holder.pid} on {host}, begun {begun} .*\+00:00, works there;", str(caught.value))
    assert "\n" not in str(caught.value)


def test_killed_holder_is_followed_at_once_and_named(holder, tmp_path: Path):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    said = []
    with only_run(tmp_path / "out", said.append):
        assert len(said) == 1 and f"process {holder.pid} on " in said[0] and "was killed" in said[0]
        assert f'"pid": {os.getpid()}' in (tmp_path / "out" / LOCK).read_text()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": 1}', '{"pid": 1, "host": "elsewhere", "since": "1970"}'])
def test_file_that_nobody_holds_is_no_lock(tmp_path: Path, content: str):
    (tmp_path / LOCK).write_text(content)
    said = []
    with only_run(tmp_path, said.append):
        pass
    assert len(said) == bool(content) and not (tmp_path / LOCK).exists()


def test_lock_is_gone_at_the_end_however_that_comes(tmp_path: Path):
    with only_run(tmp_path / "out", print):
        assert (tmp_path / "out" / LOCK).exists()
    assert list((tmp_path / "out").iterdir()) == []
    with pytest.raises(ZeroDivisionError), only_run(tmp_path / "out", print):
        raise ZeroDivisionError
    assert list((tmp_path / "out").iterdir()) == []


def test_file_that_its_holder_removes_meanwhile_is_not_mistaken_for_the_lock(tmp_path: Path, monkeypatch):
    """Between opening the file and locking it, its holder may end: that file is nobody's."""
    flock, calls = fcntl.flock, []

    def removed_first(file, operation: int) -> None:
        if not calls:
            (tmp_path / LOCK).unlink()
        calls.append(operation)
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", removed_first)
    with only_run(tmp_path, print):
        assert len(calls) == 2 and str(os.getpid()) in (tmp_path / LOCK).read_text()
        with pytest.raises(ResumeError), only_run(tmp_path, print):
            pass


def test_disk_without_locks_is_said(tmp_path: Path, monkeypatch):
    def unsupported(file, operation: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    said = []
    with only_run(tmp_path, said.append):
        assert len(said) == 1 and "this disk has no locks" in said[0]


def test_folder_that_cannot_be_made_is_one_line(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="lock: "), only_run(tmp_path / "file" / "out", print):
        pass
