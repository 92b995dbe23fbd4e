"""However one of several real processes ends, the others end soon after it and say which one it was, and why.

Most are started without torchrun, which would end the others by itself.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import forked
import tiny
import watch_worker as worker
from shardq.errors import RankError, StorageError

NUM_RANKS = 3
LIMIT_SECONDS = 60.0


@contextmanager
def processes(how: str, who: int, folder: Path, num_ranks: int = NUM_RANKS) -> Iterator[list[subprocess.Popen]]:
    """The first ranks, started by hand; none outlives the body. All write to `err`, as to one terminal."""
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    started = []
    for rank in range(num_ranks):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": NUM_RANKS, "LOCAL_WORLD_SIZE": NUM_RANKS,
                 "MASTER_ADDR": "localhost", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}  # fmt: skip
        environment = os.environ | {name: str(value) for name, value in place.items()}
        command = [sys.executable, worker.__file__, how, str(who), folder]
        with open(folder / "err", "a") as stderr:
            started.append(subprocess.Popen(command, env=environment, stderr=stderr))
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.wait()


def wait_for(ready: Callable[[], bool], seconds: float = LIMIT_SECONDS) -> None:
    """Come back once something holds, or fail."""
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline, f"not so within {seconds} s"
        time.sleep(0.02)


def met(folder: Path) -> bool:
    """Whether all ranks are in the body."""
    return len(list(folder.glob("pid-*"))) == NUM_RANKS


def run(how: str, who: int, folder: Path) -> tuple[list[int], float]:
    """Exit codes, and seconds from the meeting until all have ended."""
    ranks = forked.start(NUM_RANKS, [worker.__file__, how, who, folder], ends_others=False)
    wait_for(lambda: met(folder) or ranks.is_over())
    start = time.monotonic()
    (folder / "err").write_text(ranks.wait(LIMIT_SECONDS).stderr)
    return ranks.codes, time.monotonic() - start


def own_lines(folder: Path) -> list[str]:
    """Lines of shardq's own and of tracebacks, in the order written, without what torch warns of."""
    return [line for line in (folder / "err").read_text().splitlines() if line.startswith(("shardq:", "[rank"))]


@pytest.mark.parametrize("who", [0, 1])
@pytest.mark.parametrize(
    "how, code, own, named",
    [
        ("apart", 1, "[rank{}]: ZeroDivisionError: division by zero", "failed: ZeroDivisionError: division by zero"),
        ("error", StorageError.exit_code, "shardq: [rank {}] disk of one rank is full", "failed: disk of one rank is"),
        ("SIGKILL", -signal.SIGKILL, None, "ended without a message: it was killed"),
        ("SIGSTOP", -signal.SIGKILL, None, "has not been heard of for 4 s"),
        pytest.param(
            "blocked", RankError.exit_code, "shardq: [rank {}] stands still at watch_worker.py:",
            "failed: stands still at", marks=pytest.mark.slow,
        ),
        pytest.param(
            "still", RankError.exit_code, "shardq: [rank {}] stands still at watch_worker.py:",
            "failed: stands still at", marks=pytest.mark.slow,
        ),
        (
            "endless", RankError.exit_code, "shardq: [rank {}] computes without end at watch_worker.py:",
            "failed: computes without end at",
        ),
    ],
)  # fmt: skip
def test_failure_of_one_rank_ends_all(tmp_path, how, code, own, named, who):
    codes, seconds = run(how, who, tmp_path)
    lines = own_lines(tmp_path)
    assert codes == [code if rank == who else RankError.exit_code for rank in range(NUM_RANKS)], lines
    assert seconds < 30
    others = [line for line in lines if f"rank {who} {named}" in line]
    assert {line[: len("shardq: [rank 0]")] for line in others} == {
        f"shardq: [rank {rank}]" for rank in range(NUM_RANKS) if rank != who
    }
    # Its own message comes first, and nothing else is said.
    assert lines[-2:] == others and (own is None or lines[-3].startswith(own.format(who)))
    assert own is not None or len(lines) == 2


def test_error_on_which_all_ranks_agree_is_nobodys_failure(tmp_path):
    codes, _ = run("agreed", 1, tmp_path)
    assert codes == [StorageError.exit_code] * NUM_RANKS
    assert own_lines(tmp_path) == ["shardq: [rank 1] disk of one rank is full"] * NUM_RANKS


def test_signal_to_all_leaves_each_the_time_to_end_in_order(tmp_path):
    codes, _ = run("signalled", 0, tmp_path)
    assert codes == [128 + signal.SIGTERM] * NUM_RANKS, own_lines(tmp_path)
    assert own_lines(tmp_path) == []


@pytest.mark.parametrize(
    "how", ["busy", "early", *(pytest.param(how, marks=pytest.mark.slow) for how in ("slow", "stranger"))]
)
def test_ranks_that_do_not_fail_are_left_alone(tmp_path, how):
    codes, seconds = run(how, 1, tmp_path)
    assert codes == [0] * NUM_RANKS, own_lines(tmp_path)
    assert how == "stranger" or seconds > worker.BUSY_SECONDS - 1, "no rank was silent or alone for long"
    assert len(list(tmp_path.glob("left-*"))) == NUM_RANKS


@pytest.mark.slow
def test_machine_that_stands_still_is_no_failure(tmp_path):
    with processes("busy", 1, tmp_path) as ranks:
        wait_for(lambda: met(tmp_path))
        for sent, seconds in ((signal.SIGSTOP, 7), (signal.SIGCONT, 0)):
            for process in ranks:
                process.send_signal(sent)
            time.sleep(seconds)
        assert [process.wait(LIMIT_SECONDS) for process in ranks] == [0] * NUM_RANKS


@pytest.mark.slow
def test_rank_that_was_stopped_on_another_host_learns_that_the_others_are_gone(tmp_path):
    """The others cannot kill it: here because the process that started it is not the one that started them."""
    with processes("busy", 1, tmp_path, num_ranks=2) as ranks:
        launch = "import subprocess, sys; sys.exit(subprocess.call(sys.argv[1:]))"
        environment = Path(f"/proc/{ranks[0].pid}/environ").read_text().split("\0")
        place = dict(entry.split("=", 1) for entry in environment if "=" in entry) | {"RANK": "2", "LOCAL_RANK": "2"}
        command = [sys.executable, "-c", launch, sys.executable, worker.__file__, "busy", "1", str(tmp_path)]
        with open(tmp_path / "err-2", "w") as stderr, subprocess.Popen(command, env=place, stderr=stderr) as elsewhere:
            wait_for(lambda: met(tmp_path))
            stopped = int((tmp_path / "pid-2").read_text())
            os.kill(stopped, signal.SIGSTOP)
            codes = [process.wait(LIMIT_SECONDS) for process in ranks]
            os.kill(stopped, signal.SIGCONT)
            assert [*codes, elsewhere.wait(LIMIT_SECONDS)] == [RankError.exit_code] * NUM_RANKS
    assert "shardq: [rank 2] rank 2 has not been heard of for 4 s" in (tmp_path / "err-2").read_text()


@pytest.mark.parametrize(
    "who, line",
    [(0, "[rank 1] rank 0 cannot be reached at {} (it has not come within 15 s)"),
     pytest.param(1, "[rank 0] not all ranks have come within 15 s, missing: 1;", marks=pytest.mark.slow)],
)  # fmt: skip
def test_rank_that_never_comes_is_named(tmp_path, who, line):
    finished = tiny.torchrun(2, [worker.__file__, "absent", str(who), tmp_path], SHARDQ_MEETING_SECONDS=15)
    [found] = [line for line in finished.stderr.splitlines() if line.startswith("shardq:")]
    assert re.match(re.escape(f"shardq: {line}").replace(r"\{\}", r"\S+"), found)
    assert found.endswith("or raise SHARDQ_MEETING_SECONDS")
    assert "frame #" not in finished.stderr  # torch's own stack
    assert finished.returncode != 0 and not met(tmp_path)


def test_ranks_do_not_outlive_their_launcher(tmp_path):
    """A second run into the same folder may start at once."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(NUM_RANKS),
               worker.__file__, "busy", "1", str(tmp_path)]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(tmp_path / "err", "w") as stderr, subprocess.Popen(command, env=environment, stderr=stderr) as launcher:
        wait_for(lambda: met(tmp_path))
        launcher.kill()
    pids = [int(file.read_text()) for file in tmp_path.glob("pid-*")]
    wait_for(lambda: not any(Path(f"/proc/{pid}/fd/0").exists() for pid in pids), worker.BUSY_SECONDS - 2)
    assert any("its launcher, torchrun, is gone" in line for line in own_lines(tmp_path))
