"""Tune a finished run's scales: torchrun [--nproc-per-node N] launch/tune.py RUN --model PATH [options]."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from shardq.cli import run_command  # noqa: E402  the checkout comes first on the path

if __name__ == "__main__":
    run_command("tune", sys.argv[1:])
