import signal
import time

import pytest

from shardq.errors import Interrupted
from shardq.liveness.interrupts import interruptible

LONG_SECONDS = 4.0  # less than what ends the whole process


class EndedWithin:
    """Gets a signal while it is destroyed."""

    def __del__(self):
        signal.raise_signal(signal.SIGTERM)


def test_interruption_in_a_destructor_is_raised_after_it(capsys):
    """Python drops what is raised in a destructor and prints it."""
    destroyed = EndedWithin()
    with pytest.raises(Interrupted, match="ended by SIGTERM; go on"), interruptible("go on"):
        del destroyed
        time.sleep(LONG_SECONDS)
        pytest.fail("the interruption was lost")
    assert capsys.readouterr().err == ""


def test_other_exceptions_in_a_destructor_are_shown(capsys, monkeypatch):
    shown = []
    monkeypatch.setattr("sys.unraisablehook", shown.append)

    class Broken:
        def __del__(self):
            raise ZeroDivisionError

    broken = Broken()
    with interruptible("go on"):
        del broken
    assert [unraisable.exc_type for unraisable in shown] == [ZeroDivisionError]
