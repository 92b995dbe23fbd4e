"""launch/quantize.py on a rank that fails in the middle of a step; `test_failures.py` starts it.

Arguments: how this rank fails, which rank that is, a file for the time at which it fails, then quantize's own.
"""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import torch

from runs import committed
from shardq.cli import run_command
from shardq.errors import StorageError
from shardq.parallel.allreduce import AllReduceStepper

STEPS_BEFORE = 5  # once the first block is committed


def fail(how: str) -> None:
    """Fail, before this rank takes part in what the others wait for."""
    while how == "endless":
        pass
    if how == "still":
        threading.Event().wait()
    elif how.startswith("SIG"):
        os.kill(os.getpid(), getattr(signal, how))
    elif how == "fault":
        raise ZeroDivisionError("division by zero")
    elif how == "memory":
        torch.empty(1 << 50)
    elif how == "error":
        raise StorageError("disk of one rank is full")


def main() -> None:
    """Quantize, and fail after some steps if this is the rank to do so."""
    how, who, failed_at, *arguments = sys.argv[1:]
    output = Path(arguments[arguments.index("--output") + 1])
    step, steps = AllReduceStepper.step, []

    def step_or_fail(stepper: AllReduceStepper) -> None:
        if committed(output) > 0:
            steps.append(None)
        if len(steps) > STEPS_BEFORE and os.environ["RANK"] == who:
            Path(failed_at).write_text(str(time.time()))
            fail(how)
        step(stepper)

    AllReduceStepper.step = step_or_fail
    run_command("quantize", arguments)


if __name__ == "__main__":
    main()
