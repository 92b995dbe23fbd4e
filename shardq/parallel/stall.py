"""Whether this process stands still: blocked outside every collective, in a read from a dead disk or on a lock."""

import sys
import threading
import time
from pathlib import Path
from types import FrameType

# A tokenizer's own threads, a compiler, a download: whatever works takes more of a core than this, or writes.
IDLE_SHARE = 0.01
WAITING_IN = ("/torch/distributed/", "/deepspeed/", "/shardq/parallel/")  # where a rank waits for others


class Stall:
    """Counts the looks since which nothing has run in this process; a thread of its own looks once a beat.

    Something has run if another Python thread has been given a core at all, if more than a hundredth of one was used,
    or anything was written. A main thread that waits for other ranks is no stall, however long it does.
    """

    def __init__(self):
        self._seen: list[str] | None = None
        self._num_looks, self._cpu_start = 0, 0.0

    def look(self, beat_seconds: float) -> int:
        """The number of looks in a row, a beat apart, at which all was as at the first; 0 if something has run."""
        main = sys._current_frames().get(threading.main_thread().ident)
        waits = main is None or any(part in main.f_code.co_filename for part in WAITING_IN)
        seen, used = _traces(), time.process_time() - self._cpu_start
        if waits or seen is None or seen != self._seen or used > IDLE_SHARE * beat_seconds * (self._num_looks + 1):
            self._seen, self._num_looks, self._cpu_start = seen, 0, time.process_time()
        else:
            self._num_looks += 1
        return self._num_looks


def main_place() -> str:
    """Where the main thread is: the innermost line of this program's own, or of any where there is none."""
    frame: FrameType | None = sys._current_frames().get(threading.main_thread().ident)
    innermost = frame
    while frame is not None and "/shardq/" not in frame.f_code.co_filename:
        frame = frame.f_back
    frame = frame or innermost
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} ({frame.f_code.co_name})" if frame else "its end"


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
