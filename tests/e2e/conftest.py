"""Launches that several files of tests look at."""

from pathlib import Path

import pytest

import forked
from runs import LAUNCH, quantize_arguments


@pytest.fixture(scope="session")
def two_ranks(llama: Path, token_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Output folder and standard output of a run on two ranks. Read only."""
    output = tmp_path_factory.mktemp("two") / "out"
    finished = forked.ranks(2, [LAUNCH / "quantize.py", *quantize_arguments(llama, token_file, output)])
    assert finished.returncode == 0, finished.stderr
    return output, finished.stdout
