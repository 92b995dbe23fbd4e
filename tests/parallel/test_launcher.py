"""Ranks started by `launch/ranks.py`: what the screen shows at the end, and the exit code."""

import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("how, code", [("0", 0), ("5", 5), ("kill", 137)])
def test_screen_ends_with_the_ranks_own_line_and_the_code_is_that_of_the_cause(tmp_path, how, code):
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    command = [sys.executable, LAUNCHER, "--standalone", "--nproc-per-node", "2", script, tmp_path / "told", how]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (finished.returncode, finished.stderr) == (code, "the last line\n")
