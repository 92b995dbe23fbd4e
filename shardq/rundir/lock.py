"""One run at a time in an output folder."""

import errno
import fcntl
import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

from shardq.errors import ResumeError
from shardq.files import make_folder, storage_errors
from shardq.rundir.folder import LOCK

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def only_run(output: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Keep other runs out of a folder during the body; the folder is made if it is missing.

    The system's lock on the file decides, not the file's presence. The lock ends with its process, even a killed one,
    so that the run can go on at once, also from another host of a shared disk. The file's content is for people.

    Args:
        say: gets a line if the lock's last holder was killed, or if the disk has no locks.

    Raises:
        ResumeError: another run works there; names its process, host and start.
        StorageError: the folder cannot be written.
    """
    path = output / LOCK
    with storage_errors(path):
        make_folder(output)
        file = _locked(path, say)
    with file:
        former = file.read()
        if former:
            say(f"{output}: {_holder(former)} was killed; this run takes its place")
        with storage_errors(path):
            file.truncate(0)
            since = datetime.now(UTC).isoformat(" ", "seconds")
            file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}) + "\n")
            file.flush()
        try:
            yield
        finally:
            # Removed while it is locked: later it might be another run's. A failed disk keeps the file, as a kill does.
            with suppress(OSError):
                path.unlink()


def _locked(path: Path, say: Callable[[str], None]) -> TextIO:
    while True:
        file = open(path, "a+", encoding="utf-8")
        file.seek(0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ResumeError(
                f"{path.parent}: {_holder(file.read())} works there; wait for its end, or choose another --output"
            ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            say(f"{path.parent}: this disk has no locks; make sure that no other run works there")
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
        file.close()  # its last holder has just removed it


def _holder(content: str) -> str:
    try:
        about = json.loads(content)
        return f"process {about['pid']} on {about['host']}, begun {about['since']},"
    except (ValueError, KeyError, TypeError):
        return "another run"
