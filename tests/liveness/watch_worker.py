"""One of several ranks, one of which fails in the way that the arguments say; `test_watch.py` looks at how all end.

Arguments: how the rank fails, which rank that is, and a folder for notes.
"""

import json
import math
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

from rank_process import run_and_leave
from shardq.errors import Interrupted, ShardQError, StorageError
from shardq.liveness import meeting, stall, watch
from shardq.liveness.interrupts import interruptible
from shardq.logs import print_error
from shardq.parallel.collectives import barrier, together
from shardq.parallel.ranks import Ranks, started, this_rank

BUSY_SECONDS = 6.0
SLOW_SECONDS = 0.5
TIDYING_SECONDS = 3.0
IN_STEPS = ("endless", "still", "slow")

watch.BEAT_SECONDS = 0.2  # so that silence is found after 4 s
stall.STALL_SECONDS, stall.STEP_SECONDS = 5.0, 4.0


def knock() -> None:
    """What a stranger may do at rank 0's port: say nothing, say nonsense, or the right thing with a wrong token."""
    port = json.loads(meeting.meeting_store(1, 3).get(meeting.MEETING_PLACE))[0]
    for words in (b"", b"GET / HTTP/1.1\r\n\r\n", b'["wrong", 2, "rank 2", 1, "nobody"]\n'):
        with socket.create_connection(("localhost", port)) as stranger:
            stranger.sendall(words)


def compute(seconds: float) -> None:
    """Hold the interpreter for some seconds of a core."""
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def fail(how: str) -> None:
    """Do what this rank is to do while the others wait for it in a collective."""
    if how.startswith("SIG"):
        os.kill(os.getpid(), getattr(signal, how))
    elif how == "apart":
        raise ZeroDivisionError("division by zero")
    elif how == "error":
        raise StorageError("disk of one rank is full")
    elif how == "busy":
        compute(BUSY_SECONDS)
    elif how in ("endless", "slow"):
        compute(math.inf if how == "endless" else BUSY_SECONDS)
    elif how in ("blocked", "still"):
        blocked = threading.Lock()
        blocked.acquire()
        blocked.acquire()


def steps(ranks: Ranks, how: str, fails: bool) -> None:
    """Three steps, in the last of which this rank is to fail; one that is slow has a slow step before."""
    for number in ranks.pace.steps(range(3)):
        if how == "slow" and number == 1:
            time.sleep(SLOW_SECONDS)
        if fails and number == 2:
            fail(how)
        barrier(ranks)


def end_by_signal(tidies: bool) -> None:
    """What the signal that a launcher passes on does to a run; that of a rank which writes takes some time."""
    with interruptible("go on"), started("cpu") as ranks:
        barrier(ranks)
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        finally:
            time.sleep(TIDYING_SECONDS if tidies else 0)


def main() -> None:
    """Join, meet, fail or wait for the one that does."""
    how, who, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    rank = int(os.environ["RANK"])
    if how == "absent" and rank == who:
        signal.pause()
    if how == "stranger" and rank == who:
        knock()
    if how == "signalled":
        watch.BEAT_SECONDS = 1.0
        end_by_signal(rank == who)
    with started("cpu") as ranks:
        barrier(ranks)
        (folder / f"pid-{rank}").write_text(str(os.getpid()))
        if how == "agreed":
            together(ranks, lambda: fail("error") if rank == who else None)
        if how in IN_STEPS:
            steps(ranks, how, rank == who)
        elif rank == who:
            fail(how)
        if how == "apart":  # nobody waits for anybody: what ends the ranks is the watch alone
            time.sleep(60)
        barrier(ranks)
        (folder / f"left-{rank}").touch()
    if how == "early" and rank != who:
        time.sleep(BUSY_SECONDS)  # long after the others have left in order


if __name__ == "__main__":
    try:
        run_and_leave(main)
    except Interrupted as error:
        os._exit(error.exit_code)
    except ShardQError as error:
        print_error(str(error), error.where if error.agreed else this_rank())
        os._exit(error.exit_code)
