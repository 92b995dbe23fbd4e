"""A process that hangs is told from one that works, however quietly or long, and from one that waits for others."""

import hashlib
import math
import threading
import time
from collections.abc import Callable

import pytest
import torch

from shardq.liveness import stall
from shardq.liveness.stall import Pace, Stall

BEAT_SECONDS = 0.1
SECONDS = 0.8
LONG_SECONDS = 10.0  # a thread of the test runner's may run at some looks, and other programs may take the cores
UNFOUND = threading.Lock()  # held until a hang is found


def blocked(seconds: float = SECONDS) -> None:
    """Wait for a lock."""
    UNFOUND.acquire(timeout=seconds)


def named(path: str) -> Callable[[], None]:
    """The same in code of another file."""
    space: dict = {}
    exec(compile("def wait(lock, seconds):\n    lock.acquire(timeout=seconds)\n", path, "exec"), space)
    lock = threading.Lock()
    lock.acquire()
    return lambda: space["wait"](lock, SECONDS)


def computing_in_one_call() -> None:
    """A call into a library that holds no lock of Python's and comes back late."""
    hashlib.pbkdf2_hmac("sha256", b"", b"", 6_000_000)


def computing(seconds: float = SECONDS) -> None:
    """Hold the interpreter all the time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and UNFOUND.locked():
        pass


def computing_beside() -> None:
    """The main thread waits for a thread of Python's own."""
    end = time.monotonic() + SECONDS
    thread = threading.Thread(target=lambda: [time.sleep(0.01) for _ in iter(lambda: time.monotonic() < end, False)])
    thread.start()
    thread.join()


def found(work: Callable[[Pace], None], before_look: Callable[[], object] = lambda: None) -> list[str]:
    """How another thread, which does something before each look, finds the main thread hanging in its work."""
    pace, says, ended = Pace(), [], threading.Event()

    def watch() -> None:
        stall = Stall(pace)
        while not ended.wait(BEAT_SECONDS):
            before_look()
            says.append(stall.look(BEAT_SECONDS))
            if says[-1] and UNFOUND.locked():
                UNFOUND.release()

    UNFOUND.acquire(blocking=False)
    thread = threading.Thread(target=watch)
    thread.start()
    try:
        work(pace)
    finally:
        ended.set()
        thread.join()
    return [how for how in says if how]


def in_second_step(work: Callable[[], None], first: Callable[[], None] = lambda: None) -> Callable[[Pace], None]:
    """Two steps, of which the first sets the pace."""

    def run(pace: Pace) -> None:
        for step in pace.steps([first, work]):
            step()

    return run


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """Three beats are long; and nothing is found by the rule that is not looked at."""
    monkeypatch.setattr(stall, "STALL_SECONDS", 2.5 * BEAT_SECONDS)
    monkeypatch.setattr(stall, "STEP_SECONDS", 2.5 * BEAT_SECONDS)
    monkeypatch.setattr(stall, "STEP_RATIO", 3.0)


def test_blocked_process_is_found_and_its_place_is_named():
    how = found(lambda pace: blocked(LONG_SECONDS))
    assert how and how[0].startswith("stands still at test_stall.py:") and "(blocked): nothing has run for" in how[0]


@pytest.mark.parametrize("work", [computing_in_one_call, computing_beside, computing])
def test_process_that_works_is_none(work):
    assert not found(lambda pace: work())


@pytest.mark.parametrize(
    "path", ["/lib/torch/distributed/c10d.py", "/lib/deepspeed/comm.py", "/x/shardq/parallel/a.py"]
)
def test_process_that_waits_for_others_is_none(path):
    assert not found(in_second_step(named(path)))


def test_process_that_writes_is_none(tmp_path):
    """As a library's own threads do that download at a slow pace: nothing of Python's runs, no core is busy."""
    assert not found(lambda pace: blocked(), lambda: (tmp_path / "a").write_text("a"))


class TestSteps:
    @pytest.fixture(autouse=True)
    def patient_elsewhere(self, monkeypatch):
        monkeypatch.setattr(stall, "STALL_SECONDS", 600.0)

    @pytest.mark.parametrize(
        ("work", "how"),
        [
            (lambda: blocked(LONG_SECONDS), "stands still at test_stall.py:"),
            (lambda: computing(LONG_SECONDS), "computes without end at test_stall.py:"),
            (computing_in_one_call, "computes without end at test_stall.py:"),
        ],
    )
    def test_step_without_end_is_found(self, work, how):
        says = found(in_second_step(work))
        assert says and says[0].startswith(how)

    @pytest.mark.parametrize("work", [blocked, computing])
    def test_first_step_may_take_any_time(self, work):
        assert not found(in_second_step(lambda: None, first=work))

    @pytest.mark.parametrize("work", [blocked, computing])
    def test_step_may_take_some_times_as_long_as_the_slowest(self, work):
        assert not found(in_second_step(work, first=lambda: time.sleep(SECONDS / 2)))

    @pytest.mark.parametrize("work", [blocked, computing])
    def test_what_is_done_between_steps_may_take_any_time(self, work):
        def rest(pace: Pace) -> None:
            for number in pace.steps(range(2)):
                pace.end_step()
                list(pace.steps(range(2)))  # a look is made of steps, too
                if number == 1:
                    work()

        assert not found(rest)

    def test_pace_is_set_by_the_steps_alone(self):
        pace, limits = Pace(), []
        for _ in pace.steps(range(3)):
            limits.append(pace.step.limit)
            time.sleep(0.2)
            pace.end_step()
            for _ in pace.steps(range(2)):  # a look is made of steps, too
                time.sleep(0.4)
        assert limits[0] == math.inf and limits[1:] == pytest.approx([0.6, 0.6], abs=0.1)
        assert pace.step is None

    @pytest.mark.parametrize("path", stall.ASIDE_IN)
    def test_compiling_and_the_disk_are_no_part_of_a_step(self, path):
        assert not found(in_second_step(named(f"/lib{path}")))

    @pytest.mark.slow
    @pytest.mark.parametrize("backward", [False, True])
    def test_real_compilation_is_no_part_of_a_step(self, backward, monkeypatch, tmp_path):
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # nothing is compiled yet
        weight = torch.randn(64, 64, requires_grad=True)
        function = torch.compile(lambda values: torch.tanh(values @ weight).square().sum(), fullgraph=True)
        losses = []

        def forward() -> None:
            losses.append(function(torch.randn(8, 64)))

        if not backward:
            assert not found(in_second_step(forward))
            return
        forward()
        assert not found(in_second_step(lambda: losses[0].backward()))
