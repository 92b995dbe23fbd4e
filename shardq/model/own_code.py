"""Errors of transformers' code for a model family, turned into one line of ours."""

from collections.abc import Iterator
from contextlib import contextmanager

from shardq.devices import is_shortage
from shardq.errors import ShardQError, UnsupportedModelError

REASON_LETTERS = 240  # most letters of an error's text that are repeated; some texts hold whole tables


@contextmanager
def own_code(where: str, what: str) -> Iterator[None]:
    """Run transformers' code for one family: configs, modules and forwards, of which any may raise anything.

    Args:
        where: the folder, or the class of the model or the block.
        what: the operation that failed, in words.

    Raises:
        UnsupportedModelError: `where: what (reason)`, for any error but our own and those of memory.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, ShardQError) or is_shortage(error):
            raise
        raise UnsupportedModelError(f"{where}: {what} ({reason_of(error)})") from error


def reason_of(error: Exception) -> str:
    """The kind of an error, and the first line of its text that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # A line that ends in a colon announces the next.
    told = next((number for number, line in enumerate(lines, 1) if not line.endswith(":")), len(lines))
    return ": ".join([type(error).__name__, " ".join(lines[:told])[:REASON_LETTERS]]).removesuffix(": ")
