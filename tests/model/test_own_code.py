"""Whatever a family's own code raises becomes one line; our own errors and those of memory stay what they are."""

import pytest

from shardq.errors import CheckpointError, UnsupportedModelError
from shardq.model.own_code import own_code


class OddError(Exception):
    """An error of a kind that nobody thought of."""


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (KeyError("nonesuch"), "KeyError: 'nonesuch'"),
        (OddError(), "OddError"),
        (ValueError("\n first\nsecond"), "ValueError: first"),
        (
            OddError("Class validation error:\n    ValueError: 3 is odd\nmore"),
            "Class validation error: ValueError: 3 is odd",
        ),
        (RuntimeError("x" * 1000), "x" * 200),
    ],
    ids=lambda value: type(value).__name__,
)
def test_any_error_is_one_line_with_its_first_telling_one(error: Exception, reason: str):
    with pytest.raises(UnsupportedModelError) as caught, own_code("SomeModel", "it cannot be built"):
        raise error
    message = str(caught.value)
    assert message.startswith("SomeModel: it cannot be built (") and reason in message
    assert "\n" not in message and len(message) < 400
    assert caught.value.__cause__ is error


@pytest.mark.parametrize(
    "error",
    [CheckpointError("damaged"), MemoryError(), RuntimeError("CUDA out of memory"), KeyboardInterrupt()],
    ids=repr,
)
def test_our_own_errors_and_those_of_memory_pass(error: BaseException):
    with pytest.raises(type(error)) as caught, own_code("SomeModel", "it cannot be built"):
        raise error
    assert caught.value is error
