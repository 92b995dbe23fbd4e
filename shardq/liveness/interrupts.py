"""SIGTERM and SIGINT end the program cleanly, within seconds, and with a line that says how to go on."""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from shardq.background import finish_interrupted
from shardq.errors import Interrupted
from shardq.logs import print_error

GRACE_SECONDS = 5.0
AGAIN_SECONDS = 0.01
SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def interruptible(advice: str) -> Iterator[None]:
    """During the body, which has to run in the main thread, the first SIGTERM or SIGINT raises Interrupted.

    Further signals are ignored, and background threads finish the work that they have begun. If the main thread cannot
    raise the exception, as in a collective that waits for a rank that is gone, or does not end after it, the process is
    ended some seconds later.

    Args:
        advice: how to go on after the interruption.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        for further in SIGNALS:
            signal.signal(further, signal.SIG_IGN)
        raise Interrupted(number, advice)

    def raise_again(unraisable: "sys.UnraisableHookArgs") -> None:
        """Python drops what is raised in a destructor: an interruption gets another chance, outside of it."""
        if not isinstance(unraisable.exc_value, Interrupted):
            former_hook(unraisable)
            return
        signal.signal(unraisable.exc_value.number, interrupt)
        threading.Timer(AGAIN_SECONDS, os.kill, (os.getpid(), unraisable.exc_value.number)).start()

    def end_late() -> None:
        while received := listening.recv(1):
            if received[0] in SIGNALS:  # Python writes the numbers of all handled signals into this socket
                time.sleep(GRACE_SECONDS)
                error = Interrupted(received[0], advice)
                print_interruption(error)
                os._exit(error.exit_code)

    listening, told = socket.socketpair()
    told.setblocking(False)
    former = {number: signal.signal(number, interrupt) for number in SIGNALS}
    former_fd = signal.set_wakeup_fd(told.fileno(), warn_on_full_buffer=False)  # written to even in a blocking call
    former_hook, sys.unraisablehook = sys.unraisablehook, raise_again
    threading.Thread(target=end_late, name="interrupts", daemon=True).start()
    try:
        yield
    except Interrupted as error:
        finish_interrupted(error)  # here, where further signals are ignored
        raise
    finally:
        sys.unraisablehook = former_hook
        signal.set_wakeup_fd(former_fd)
        told.close()
        for number, handler in former.items():
            signal.signal(number, handler)


def print_interruption(error: Interrupted) -> None:
    """Print the interruption once a host: all its ranks get the signal that their launcher gets."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print_error(str(error))
