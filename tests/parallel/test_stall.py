"""A process that stands still is told from one that works, however quietly, and from one that waits for others."""

import hashlib
import threading
import time
from collections.abc import Callable

import pytest

from shardq.parallel import stall
from shardq.parallel.stall import Stall, main_place

BEAT_SECONDS = 0.2
SECONDS = 1.5
LONG_SECONDS = 4.0  # twenty looks: a thread of the test runner's may run at some of them


def blocked(seconds: float = SECONDS) -> None:
    """Wait for a lock that nobody gives back."""
    lock = threading.Lock()
    lock.acquire()
    lock.acquire(timeout=seconds)


def named(path: str) -> Callable[[], None]:
    """The same in code of another file."""
    space: dict = {}
    exec(compile("def wait(lock, seconds):\n    lock.acquire(timeout=seconds)\n", path, "exec"), space)
    lock = threading.Lock()
    lock.acquire()
    return lambda: space["wait"](lock, SECONDS)


def computing_in_one_call() -> None:
    """A call into a library that holds no lock of Python's and comes back late."""
    hashlib.pbkdf2_hmac("sha256", b"", b"", 4_000_000)


def computing_beside() -> None:
    """The main thread waits for a thread of Python's own."""
    end = time.monotonic() + SECONDS
    thread = threading.Thread(target=lambda: [time.sleep(0.01) for _ in iter(lambda: time.monotonic() < end, False)])
    thread.start()
    thread.join()


def most_looks(work: Callable[[], None]) -> tuple[int, str]:
    """The highest number of idle looks that another thread counts while the main thread does something; and where."""
    looks, places, ended = [0], [""], threading.Event()

    def watch() -> None:
        stalled = Stall()
        while not ended.wait(BEAT_SECONDS):
            looks.append(stalled.look(BEAT_SECONDS))
            places.append(main_place())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        work()
    finally:
        ended.set()
        thread.join()
    return max(looks), places[len(places) // 2]


def test_blocked_process_is_found_and_its_place_is_named():
    looks, place = most_looks(lambda: blocked(LONG_SECONDS))
    assert looks >= 5 and place.startswith("test_stall.py:") and place.endswith("(blocked)")


@pytest.mark.parametrize("work", [computing_in_one_call, computing_beside])
def test_process_that_works_is_none(work):
    assert most_looks(work)[0] <= 2


@pytest.mark.parametrize(
    "path", ["/lib/torch/distributed/c10d.py", "/lib/deepspeed/comm.py", "/x/shardq/parallel/a.py"]
)
def test_process_that_waits_for_others_is_none(path):
    assert most_looks(named(path))[0] == 0


def test_process_that_writes_is_none(monkeypatch):
    """As a library's own threads do that download at a slow pace: nothing of Python's runs, no core is busy."""
    traces = stall._traces
    monkeypatch.setattr(stall, "_traces", lambda: [*traces(), f"wchar: {int(time.monotonic() * 4)}"])
    assert most_looks(blocked)[0] <= 2


def test_written_bytes_leave_a_trace(tmp_path):
    before = stall._traces()
    (tmp_path / "a").write_text("a")
    assert [line for line in stall._traces() if line.startswith("wchar")] != before[:1]
