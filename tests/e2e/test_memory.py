"""Memory does not grow with the model's depth, nor with the samples once they are on disk; minutes, so run by name.

bash tools/test.sh -m slow tests/e2e/test_memory.py -s
"""

import subprocess
import sys
from pathlib import Path

import pytest

import tiny
from runs import LAUNCH, last_json

MAKE_SYNTHETIC = Path(__file__).parents[2] / "tools" / "make_synthetic.py"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Function from a number of blocks to a random Llama of hidden size 1024 with that many equal blocks."""

    def make(num_blocks):
        folder = tmp_path_factory.mktemp("synthetic") / f"{num_blocks}-blocks"
        subprocess.run([sys.executable, MAKE_SYNTHETIC, folder, "--blocks", str(num_blocks)], check=True)
        return folder

    return make


def peak_bytes(model, output, num_samples, sequence_length, *more):
    """Peak resident memory of one whole quantization run in a process of its own."""
    return peak_of("quantize.py", "--model", model, "--output", output, "--calib.dataset", model / "tokens.safetensors",
                   "--calib.samples", num_samples, "--calib.sequence_length", sequence_length, "--optimize.iterations",
                   4, "--optimize.batch_size", 1, "--cache.placement", "disk", *more)  # fmt: skip


def peak_of(program, *arguments):
    tiny.LAUNCH_TIMEOUT_SECONDS = 1800
    finished = tiny.torchrun(1, [LAUNCH / program, *arguments])
    assert finished.returncode == 0, finished.stderr
    return last_json(finished.stdout)["peak_rss_bytes"]


def test_memory_does_not_grow_with_depth(checkpoint, tmp_path):
    peaks = {num: peak_bytes(checkpoint(num), tmp_path / str(num), 4, 256) for num in (4, 8, 32)}
    print({num: f"{peak / 2**20:.0f} MiB" for num, peak in peaks.items()})
    assert max(peaks.values()) < 1.03 * min(peaks.values())


def test_memory_of_tuning_does_not_grow_with_depth(checkpoint, tmp_path):
    peaks = {}
    for num in (4, 32):
        model, run = checkpoint(num), tmp_path / str(num)
        peak_bytes(model, run, 4, 256, "--quant.method", "rtn")
        peaks[num] = peak_of("tune.py", run, "--model", model, "--tune.steps", 2)
    print({num: f"{peak / 2**20:.0f} MiB" for num, peak in peaks.items()})
    assert max(peaks.values()) < 1.05 * min(peaks.values())


def test_memory_does_not_grow_with_samples_on_disk(checkpoint, tmp_path):
    model = checkpoint(2)
    peaks = {num: peak_bytes(model, tmp_path / str(num), num, 256) for num in (32, 256)}
    print({num: f"{peak / 2**20:.0f} MiB" for num, peak in peaks.items()})
    assert max(peaks.values()) < 1.1 * min(peaks.values())
