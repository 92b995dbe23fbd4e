"""Ranks started by `launch/ranks.py`: what the screen shows at the end, and the exit code."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shardq.parallel.launcher import _cause

LAUNCHER = Path(__file__).parents[2] / "launch" / "ranks.py"

# Rank 1 ends with the cause, then rank 0 as one that ends because of it.
RANK = """
import os, pathlib, sys, time
told = pathlib.Path(sys.argv[1])
if os.environ["RANK"] == "1":
    print("the last line", file=sys.stderr, flush=True)
    told.touch()
    os.kill(os.getpid(), 9) if sys.argv[2] == "kill" else sys.exit(int(sys.argv[2]))
while not told.exists():
    time.sleep(0.01)
sys.exit(8 if sys.argv[2] != "0" else 0)
"""


@pytest.mark.parametrize("how, code", [pytest.param("0", 0, marks=pytest.mark.slow), ("5", 5), ("kill", 137)])
def test_screen_ends_with_the_ranks_own_line_and_the_code_is_that_of_the_cause(tmp_path, how, code):
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    command = [sys.executable, LAUNCHER, "--standalone", "--nproc-per-node", "2", script, tmp_path / "told", how]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (finished.returncode, finished.stderr) == (code, "the last line\n")


@pytest.mark.parametrize(
    "ends, code",
    [
        ([(10, 5), (10, 5)], 5),  # agreed
        ([(10, 8), (10, 5), (10, 8)], 5),
        ([(11, 8), (10, -9)], -9),  # killed for want of memory, and one that heard of it
        ([(10, 8), (40, -9)], 8),  # never met; the one that was stopped is killed by torchrun
        ([(10, 1), (10, -15)], 1),
        ([(10, 8), (10, 143)], 8),  # because of another host's rank
    ],
)
def test_cause_is_told_from_what_came_of_it(ends, code):
    assert _cause(ends) == code


def test_signal_ends_the_ranks_and_is_the_code(tmp_path):
    script, deadline = tmp_path / "rank.py", time.monotonic() + 60
    script.write_text("import os, sys, time\nopen(sys.argv[1] + os.environ['RANK'], 'w')\ntime.sleep(60)\n")
    command = [sys.executable, LAUNCHER, "--standalone", "--nproc-per-node", "2", script, tmp_path / "rank"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as launcher:
        while len(list(tmp_path.glob("rank[01]"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.1)
        launcher.send_signal(signal.SIGTERM)
        said = launcher.communicate(timeout=60)[1]
    assert (launcher.returncode, said) == (128 + signal.SIGTERM, "")
