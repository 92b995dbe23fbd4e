"""Errors that a user can act on; each class has the exit code that the command line returns."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager


class ShardQError(Exception):
    """One line that says what is wrong, where, and what to do.

    `agreed` is set when every rank raises the same error, so that only one rank a host prints it; `where` is then the
    rank that it happened on, unless it was all of them.
    """

    exit_code = 1
    agreed = False
    where = ""


class ConfigError(ShardQError):
    """An option is unknown, of the wrong type, out of range, or contradicts another."""

    exit_code = 2


class CheckpointError(ShardQError):
    """The source checkpoint is missing, truncated, damaged or does not match its config.json."""

    exit_code = 3


class UnsupportedModelError(ShardQError):
    """The checkpoint is whole, but shardq cannot quantize this kind of model."""

    exit_code = 3


class CalibrationError(ShardQError):
    """The text, the token ids or the tokenizer cannot be used."""

    exit_code = 4


class StorageError(ShardQError):
    """The output folder or a cache cannot be written or read back, or an export cannot be uploaded."""

    exit_code = 5


class ResumeError(ShardQError):
    """The output folder belongs to another run, or its files differ from their digests in the ledger."""

    exit_code = 6


class QuantizationError(ShardQError):
    """A number that must be finite or positive is not."""

    exit_code = 7


@contextmanager
def located(place: str) -> Iterator[None]:
    """Prefix the text of a QuantizationError in the body with a place, such as the block and the matrix."""
    try:
        yield
    except QuantizationError as error:
        error.args = (f"{place}: {error}",)
        raise


class RankError(ShardQError):
    """Another rank failed; its own message says why."""

    exit_code = 8


class MemoryShortageError(ShardQError):
    """The device, or the host, has less memory left than was asked for."""

    exit_code = 9


class Stopped(ShardQError):
    """The run ends between two blocks because it was asked to; the same command goes on."""

    exit_code = 10


class Interrupted(KeyboardInterrupt):
    """A signal asks this process to end: not an error, and not for handlers of errors to catch."""

    def __init__(self, number: int, advice: str):
        super().__init__(f"ended by {signal.Signals(number).name}; {advice}")
        self.number = number
        self.exit_code = 128 + number
