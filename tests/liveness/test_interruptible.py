import json

import pytest

import forked

PROGRAM = __file__.replace("test_interruptible", "ended_in_destructor")


@pytest.mark.parametrize(
    ("what", "raised", "shown"), [("signal", "ended by SIGTERM; go on", ""), ("fault", None, "ZeroDivisionError")]
)
def test_only_an_interruption_is_raised_again_after_a_destructor(what, raised, shown):
    """Python prints what is raised in a destructor, and drops it."""
    done = forked.ranks(1, [PROGRAM, what])
    assert done.returncode == 0 and json.loads(done.stdout) == {"raised": raised}
    assert ("Exception ignored" in done.stderr) == bool(shown) and shown in done.stderr
