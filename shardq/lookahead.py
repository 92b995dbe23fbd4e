"""Work on one item while the next is already on its way."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")


def lookahead(load: Callable[[Key], Value], keys: Iterable[Key]) -> Iterator[tuple[Key, Value]]:
    """Yield `(key, load(key))` in order, with exactly one load running ahead in a background thread.

    At most two values are alive: the one in use and the one being loaded. An error in `load` is raised where
    its value would have been yielded.
    """
    remaining = iter(keys)
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="lookahead") as executor:

        def start_next() -> list:
            return [(key, executor.submit(load, key)) for key in islice(remaining, 1)]

        pending = start_next()
        while pending:
            key, future = pending.pop()
            value = future.result()
            pending = start_next()
            yield key, value
            # The value just used must not stay alive while the generator waits for the next.
            del value, future
