"""Whether this process hangs outside every collective: it stands still, or does not come to the end of a step."""

import math
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TypeVar

from shardq.compiling import COMPILER_FILES

Item = TypeVar("Item")

STALL_SECONDS = 600.0  # a disk, a server of files or a stopped terminal may be silent for minutes and come back
# A step waits for nothing but other ranks, and is like those before it; slower where a core is throttled or memory is
# swapped.
STEP_SECONDS, STEP_RATIO = 20.0, 20.0
# A tokenizer's own threads, a compiler, a download: whatever works takes more of a core than this, or writes.
IDLE_SHARE = 0.01
WAITING_IN = ("/torch/distributed/", "/deepspeed/", "/shardq/parallel/")  # where a rank waits for others
# No part of a step, wherever it comes: compiling for sizes not met before; waiting for a thread that reads or writes.
ASIDE_IN = (*COMPILER_FILES, "/shardq/background.py")


@dataclass
class Step:
    """A step under way: seconds that it may take, and when it has ended those that it took."""

    limit: float
    begun: float = field(default_factory=time.monotonic)
    seconds: float = 0.0


class Pace:
    """The main thread's way through steps that are much alike, of a training or a pass."""

    def __init__(self):
        self.step: Step | None = None

    def steps(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield the items; what is done with each, until `end_step` or until the next is asked for, is a step.

        The first may take any time, and so tells what the others may. What counts of it are its waits for other ranks,
        too: so a rank whose first part of a batch is empty learns how long a part takes.
        """
        limit, slowest = math.inf, 0.0
        for item in items:
            step = self.step = Step(limit)
            try:
                yield item
            finally:
                self.end_step()
            del item  # it must not stay alive while the next is made
            slowest = max(slowest, step.seconds)
            limit = max(STEP_SECONDS, STEP_RATIO * slowest)

    def end_step(self) -> None:
        """The step is done: what comes before the next may take any time."""
        if self.step:
            self.step.seconds = time.monotonic() - self.step.begun
            self.step = None


class Stall:
    """Says when the main thread hangs; a thread of its own looks once a beat, and time is counted in such beats.

    It stands still if no other Python thread has been given a core at all, no more than a hundredth of one was used,
    and nothing was written. It does not come to a step's end if the process has used one core for longer than the step
    may take; other programs that take the cores do not count for that. Waiting for other ranks is neither.
    """

    def __init__(self, pace: Pace):
        self._pace, self._step = pace, pace.step
        self._seen: list[str] | None = None
        self._still = self._worked = self._cpu_start = self._cpu_seen = 0.0

    def look(self, beat_seconds: float) -> str | None:
        """How the main thread hangs, and where; None as long as it does not."""
        waits, seen = _main_waits(), _traces()
        cpu = time.process_time() - time.thread_time()  # of all threads but this
        step = None if waits or _is_aside() else self._pace.step
        self._still += beat_seconds
        if waits or seen is None or seen != self._seen or cpu - self._cpu_start > IDLE_SHARE * self._still:
            self._seen, self._still, self._cpu_start = seen, 0.0, cpu
        self._worked += min(beat_seconds, cpu - self._cpu_seen)
        if step is None or step is not self._step:
            self._step, self._worked = step, 0.0
        self._cpu_seen = cpu
        limit = step.limit if step else math.inf
        if self._worked > limit:
            return f"computes without end at {main_place()}: one step has taken {self._worked:.0f} s of a core"
        if self._still > min(limit, STALL_SECONDS):
            advice = "" if step else "; check its host's disks"
            return f"stands still at {main_place()}: nothing has run for {self._still:.0f} s{advice}"
        return None


def main_place() -> str:
    """Where the main thread is: the innermost line of this program's own, or of any where there is none."""
    frame: FrameType | None = sys._current_frames().get(threading.main_thread().ident)
    innermost = frame
    while frame is not None and "/shardq/" not in frame.f_code.co_filename:
        frame = frame.f_back
    frame = frame or innermost
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} ({frame.f_code.co_name})" if frame else "its end"


def _main_waits() -> bool:
    """Whether the main thread waits for other ranks."""
    main = sys._current_frames().get(threading.main_thread().ident)
    return main is None or any(part in main.f_code.co_filename for part in WAITING_IN)


def _is_aside() -> bool:
    """Whether any thread, as backward has its own on a GPU, is in what is no part of a step."""
    for frame in sys._current_frames().values():
        while frame is not None:
            if frame.f_code.co_filename.endswith(ASIDE_IN):
                return True
            frame = frame.f_back
    return False


def _traces() -> list[str] | None:
    """What changes whenever another Python thread runs, or this process writes; None where the system does not say."""
    others = sorted(
        thread.native_id or 0 for thread in threading.enumerate() if thread is not threading.current_thread()
    )
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
        for thread in others:
            lines += Path(f"/proc/self/task/{thread}/status").read_text().splitlines()
        return [line for line in lines if line.startswith(("wchar", "voluntary_ctxt", "nonvoluntary_ctxt"))]
    except OSError:  # not Linux, or a thread that begins or ends just now
        return None
