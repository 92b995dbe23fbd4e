"""Detects that this process hangs outside every collective: it makes no progress, or a step does not end."""

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

STALL_SECONDS = 600.0  # a disk, a file server or a stopped terminal may pause for minutes and then continue
# A step waits only for other ranks, and takes as long as earlier steps; longer where a core is throttled or memory is
# swapped.
STEP_SECONDS, STEP_RATIO = 20.0, 20.0
# Any work, such as a tokenizer's threads, a compiler or a download, uses more of a core than this, or writes.
IDLE_SHARE = 0.01
WAITING_IN = ("/torch/distributed/", "/deepspeed/", "/shardq/parallel/")  # where a rank waits for others
# Not counted as part of a step: compiling for new sizes, and waiting for a thread that reads or writes.
ASIDE_IN = (*COMPILER_FILES, "/shardq/background.py")


@dataclass
class Step:
    """A step of the main thread: its time limit in seconds, and the seconds that it took once it has ended."""

    limit: float
    begun: float = field(default_factory=time.monotonic)
    seconds: float = 0.0


class Pace:
    """Progress of the main thread through similar steps, those of a training or of a pass."""

    def __init__(self):
        self.step: Step | None = None

    def steps(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield the items; the time from an item to `end_step`, or to the request for the next item, is a step.

        The first step has no limit, and sets the limit of the others. Its waits for other ranks count too, so a rank
        whose first part of a batch is empty learns how long a part takes.
        """
        limit, slowest = math.inf, 0.0
        for item in items:
            step = self.step = Step(limit)
            try:
                yield item
            finally:
                self.end_step()
            del item  # free its memory before the next item is made
            slowest = max(slowest, step.seconds)
            limit = max(STEP_SECONDS, STEP_RATIO * slowest)

    def end_step(self) -> None:
        """End the step; the time until the next step begins has no limit."""
        if self.step:
            self.step.seconds = time.monotonic() - self.step.begun
            self.step = None


class Stall:
    """Detects that the main thread hangs. The watch's thread calls `look` once a beat; time is counted in beats.

    The process makes no progress if no other Python thread has run, less than a hundredth of a core was used, and
    nothing was written. A step does not end if the process has used one core for longer than the step's limit; time
    that other programs take from the cores does not count. Waiting for other ranks is no hang.
    """

    def __init__(self, pace: Pace):
        self._pace, self._step = pace, pace.step
        self._seen: list[str] | None = None
        self._still = self._worked = self._cpu_start = self._cpu_seen = 0.0

    def look(self, beat_seconds: float) -> str | None:
        """A text that says how and where the main thread hangs; None while it does not."""
        waits, seen = _main_waits(), _traces()
        cpu = time.process_time() - time.thread_time()  # of all threads except this one
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
    """Position of the main thread: the innermost line in this package, else the innermost line of all."""
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
    """Whether any thread does work that is not part of a step; on a GPU backward has a thread of its own."""
    for frame in sys._current_frames().values():
        while frame is not None:
            if frame.f_code.co_filename.endswith(ASIDE_IN):
                return True
            frame = frame.f_back
    return False


def _traces() -> list[str] | None:
    """Values that change when another Python thread runs or this process writes; None where the system has none."""
    others = sorted(
        thread.native_id or 0 for thread in threading.enumerate() if thread is not threading.current_thread()
    )
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
        for thread in others:
            lines += Path(f"/proc/self/task/{thread}/status").read_text().splitlines()
        return [line for line in lines if line.startswith(("wchar", "voluntary_ctxt", "nonvoluntary_ctxt"))]
    except OSError:  # not Linux, or a thread is starting or ending
        return None
