"""Work that goes on beside the computation, in one background thread each."""

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

MAX_BEHIND = 2  # values that may wait to be taken care of: one under way, one next


def lookahead(
    load: Callable[[Key], Value], keys: Iterable[Key], waiting: Waiting = nullcontext
) -> Iterator[tuple[Key, Value]]:
    """Yield `(key, load(key))` in order, with exactly one load running ahead.

    At most two values are alive: the one in use and the one being loaded. An error in `load` is raised where
    its value would have been yielded.
    """
    remaining = iter(keys)
    with _thread("lookahead") as executor:

        def start_next() -> list:
            return [(key, executor.submit(load, key)) for key in islice(remaining, 1)]

        pending = start_next()
        while pending:
            key, future = pending.pop()
            with waiting():
                value = future.result()
            pending = start_next()
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
def behind(work: Callable[..., None], waiting: Waiting = nullcontext) -> Iterator[Callable[..., None]]:
    """Yield a function that has `work` done on its arguments later, one call after the other.

    All work is done when the body has ended. An error in `work` is raised at one of the next calls, or at the end.
    """
    pending: deque[Future] = deque()

    def settle(allowed: int) -> None:
        while len(pending) > allowed:
            with waiting():
                pending.popleft().result()

    def submit(*args: object) -> None:
        settle(MAX_BEHIND - 1)
        pending.append(executor.submit(work, *args))

    with _thread("behind") as executor:
        yield submit
        settle(0)


def _thread(name: str) -> ThreadPoolExecutor:
    # One core: a background thread with a team of its own would take the cores from the computation's team. Asking
    # settles this thread's own number first; a thread that computes later than the setting would take that over.
    torch.get_num_threads()
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix=name, initializer=torch.set_num_threads, initargs=(1,))
