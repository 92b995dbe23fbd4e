"""Ending a run after its present block, where it is asked to: by a file `stop` in its folder, or by SIGUSR1."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from shardq.errors import Stopped, StorageError
from shardq.files import remove
from shardq.parallel.collectives import on_rank_zero
from shardq.parallel.ranks import Ranks
from shardq.rundir.folder import RunFolder


@contextmanager
def stoppable(output: Path, ranks: Ranks) -> Iterator[None]:
    """During the body, SIGUSR1 to any rank writes the file; an older file, or one that comes too late, is removed.

    Outside the main thread the signal's handler is not changed.
    """
    on_rank_zero(ranks, lambda: _taken_away(output))
    hears = threading.current_thread() is threading.main_thread()  # no other may choose what a signal does
    former = hears and signal.signal(signal.SIGUSR1, lambda number, frame: RunFolder(output).stop.touch())
    try:
        yield
    finally:
        if hears:
            signal.signal(signal.SIGUSR1, former)
        if ranks.rank == 0:
            with suppress(StorageError):  # what has failed is said already
                _taken_away(output)


def stop_if_asked(output: Path, ranks: Ranks, done: int, num: int, what: str = "block") -> None:
    """End all ranks if the file exists, and remove it; called between two blocks or other units of work.

    Raises:
        Stopped: the file existed.
    """
    if on_rank_zero(ranks, lambda: _taken_away(output)):
        error = Stopped(f"{output}: stopped as asked, {done} of {num} {what}s are done; the same command goes on")
        error.agreed = True  # every rank has heard the same from rank 0
        raise error


def _taken_away(output: Path) -> bool:
    stop = RunFolder(output).stop
    was_there = stop.exists()
    if was_there:
        remove(stop)
    return was_there
