"""Work that goes on beside the computation, in background threads."""

import threading
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
"""Gives a context that is entered while the computation waits for the background."""

THREADS = "background"  # how the names of all threads here begin
SPARE = 1  # values that may wait to be taken care of beside those under way


def lookahead(
    load: Callable[[Key], Value], keys: Iterable[Key], waiting: Waiting = nullcontext, threads: int = 1
) -> Iterator[tuple[Key, Value]]:
    """Yield `(key, load(key))` in order, with one load running ahead in each thread.

    Alive are the value in use and one for each thread. An error in `load` is raised where its value would have been
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
            # The value just used must not stay alive while the generator waits for the next.
            del value, future


def one_by_one(
    load: Callable[[Key], Value], keys: Iterable[Key], waiting: Waiting = nullcontext
) -> Iterator[tuple[Key, Value]]:
    """As `lookahead`, but nothing runs ahead: only the value in use is alive."""
    for key in keys:
        with waiting():
            value = load(key)
        yield key, value
        del value


@contextmanager
def behind(
    work: Callable[..., None], waiting: Waiting = nullcontext, threads: int = 1
) -> Iterator[Callable[..., None]]:
    """Yield a function that has `work` done on its arguments later, one call after the other in each thread.

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


def finish_interrupted() -> None:
    """Wait for the threads that an interruption has left at work.

    Their executors, which are closed, wait for them, but for one that was just being started: it runs, and its executor
    does not know it yet.
    """
    for thread in threading.enumerate():
        if thread.name.startswith(THREADS):
            thread.join()


def _threads(num: int) -> ThreadPoolExecutor:
    # One core: a background thread with a team of its own would take the cores from the computation's team. Asking
    # settles this thread's own number first; a thread that computes later than the setting would take that over.
    torch.get_num_threads()
    return ThreadPoolExecutor(num, thread_name_prefix=THREADS, initializer=torch.set_num_threads, initargs=(1,))
