"""A program that gets a signal while it destroys an object; `test_interruptible.py` starts it.

Argument: `signal`, or `fault` for another exception in a destructor.
"""

import json
import signal
import sys
import time

from shardq.errors import Interrupted
from shardq.liveness.interrupts import interruptible

LONG_SECONDS = 4.0  # less than what ends the program from another thread


class Destroyed:
    """Calls a function when it is destroyed."""

    def __init__(self, call):
        self.call = call

    def __del__(self):
        self.call()


def main() -> None:
    """Destroy it, and wait."""
    calls = {"signal": lambda: signal.raise_signal(signal.SIGTERM), "fault": lambda: 1 / 0}
    destroyed = [Destroyed(calls[sys.argv[1]])]
    raised = None
    try:
        with interruptible("go on"):
            destroyed.clear()
            time.sleep(LONG_SECONDS if sys.argv[1] == "signal" else 0)
    except Interrupted as error:
        raised = str(error)
    print(json.dumps({"raised": raised}))


if __name__ == "__main__":
    main()
