"""Work in background threads while the computation goes on."""

import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import islice
from typing import TypeVar

import torch

Key = TypeVar("Key")
Value = TypeVar("Value")
Waiting = Callable[[], AbstractContextManager]
"""Gives a context that is entered while the computation waits for a background thread."""

THREADS = "background"  # prefix of the names of all threads in this module
SPARE = 1  # values that may wait for a thread in addition to those in work


def lookahead(
    load: Callable[[Key], Value], keys: Iterable[Key], waiting: Waiting = nullcontext, threads: int = 1
) -> Iterator[tuple[Key, Value]]:
    """Yield `(key, load(key))` in order, with one load running ahead in each thread.

    In memory are the value in use and one for each thread. An error in `load` is raised where its value would have been
    yielded.
    """
    remaining = iter(keys)
    with _threads(threads) as executor:
        pending: deque[tuple[Key, Future]] = deque()

        def start(num: int) -> None:
            pending.extend((key, executor.submit(load, key)) for key in islice(remaining, num))

        start(threads)
        while pending:
            key, future = pending.popleft()
            with waiting():
                value = future.result()
            start(1)
            yield key, value
            # Frees the value just used while the generator waits for the next.
            del value, future


def one_by_one(
    load: Callable[[Key], Value], keys: Iterable[Key], waiting: Waiting = nullcontext
) -> Iterator[tuple[Key, Value]]:
    """Yield `(key, load(key))` as `lookahead` does, without running ahead: only the value in use is in memory."""
    for key in keys:
        with waiting():
            value = load(key)
        yield key, value
        del value


@contextmanager
def behind(
    work: Callable[..., None], waiting: Waiting = nullcontext, threads: int = 1
) -> Iterator[Callable[..., None]]:
    """Yield a function that queues `work` on its arguments, one call after the other in each thread.

    All work is done when the body has ended. An error in `work` is raised at one of the next calls, or at the end.
    """
    pending: deque[Future] = deque()

    def settle(allowed: int) -> None:
        while len(pending) > allowed:
            with waiting():
                pending.popleft().result()

    def submit(*args: object) -> None:
        settle(threads + SPARE - 1)
        pending.append(executor.submit(work, *args))

    with _threads(threads) as executor:
        yield submit
        settle(0)


def finish_interrupted(error: BaseException) -> None:
    """Wait for the threads that still work after an interruption; the frames of its traceback lose their variables.

    Closed executors wait for their threads, except for one that was just being started: its executor does not know it
    yet.
    """
    # Generators that the frames still hold have threads that wait for more to load, and would never end.
    traceback.clear_frames(error.__traceback__)
    for thread in threading.enumerate():
        if thread.name.startswith(THREADS):
            thread.join()


def _threads(num: int) -> ThreadPoolExecutor:
    # One core: a background thread with its own team would take cores from the computation's team. The question fixes
    # this thread's own number first; otherwise a thread that computes only later would take over the new setting.
    torch.get_num_threads()
    return ThreadPoolExecutor(num, thread_name_prefix=THREADS, initializer=torch.set_num_threads, initargs=(1,))
