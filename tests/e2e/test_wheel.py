"""The wheel, installed alone: its verbs and recipes work in a folder that is not the checkout."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from runs import last_json

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", name="installed")
def _installed(tmp_path_factory) -> Path:
    """Folder with what `pip install` makes of a wheel that is built from a copy of the checkout."""
    copy, folder = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("installed")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("shardq", "configs"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder, copy], check=True)
    return folder


def run(installed: Path, folder: Path, *arguments: object) -> str:
    """Output of the installed command, run in a folder; its modules go before any that the environment has."""
    command = [sys.executable, installed / "bin" / "shardq", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(installed)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_recipe_runs_by_name_from_the_installed_wheel(installed, tmp_path, llama, token_file):
    assert "w4a16-vllm" in run(installed, tmp_path, "quantize", "--help")
    small = ["--calib.dataset", token_file, "--calib.samples", 8, "--calib.sequence_length", 64]
    summary = run(installed, tmp_path, "quantize", llama, "--config", "w8a8-vllm", "--output", "out", *small,
                  "--quant.method", "rtn")  # fmt: skip
    assert (
        last_json(summary)["output"] == "out"
        and "quantization_config" in (tmp_path / "out" / "config.json").read_text()
    )
    run(installed, tmp_path, "verify", "out")
