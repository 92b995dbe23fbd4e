"""Runs of the command line's own functions, in this process, as rank 0 of 1, and what tests look for in a run."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

import forked
import tiny
from shardq.cli import parse
from shardq.commands.commit import OnCommit
from shardq.commands.evaluate import evaluate
from shardq.commands.quantize import quantize
from shardq.formats.block_file import read_block
from shardq.parallel.ranks import Ranks
from shardq.rundir.folder import RunFolder

LAUNCH = Path(__file__).parents[2] / "launch"
Launcher = Callable[..., subprocess.CompletedProcess]  # takes the number of ranks and a program
ONE_RANK = Ranks(0, 1, torch.device("cpu"))


def quantize_arguments(model: Path, tokens: Path, output: Path, *more: object) -> list[str]:
    """Arguments of a short run on the tiny model and token file, the same on every machine; later ones win."""
    fixed = ["--model", model, "--output", output, "--calib.dataset", tokens, "--calib.samples", 8,
             "--calib.sequence_length", 64, "--optimize.preset", "aimet", "--optimize.iterations", 24,
             "--optimize.batch_size", 2, "--optimize.weight_lr", 3e-3, "--optimize.compile", "off",
             "--optimize.precision", "float32", "--optimize.last_block", "predictions",
             "--quant.group_size", -1, "--export.checkpoint", "plain"]  # fmt: skip
    return [str(argument) for argument in (*fixed, *more)]


def run_quantize(
    model: Path,
    tokens: Path,
    output: Path,
    *more: object,
    ranks: Ranks = ONE_RANK,
    on_commit: OnCommit = lambda block: None,
    stop_after: int | None = None,
) -> dict:
    """Quantize on one rank; give the summary.

    Args:
        stop_after: a block in which the run is asked to stop.
    """

    def seen(block: int | None) -> None:
        on_commit(block)
        if stop_after is not None and block == stop_after:
            RunFolder(output).stop.touch()

    return quantize(parse("quantize", quantize_arguments(model, tokens, output, *more)), ranks, seen)


def run_evaluate(model: Path, tokens: Path, *more: object, ranks: Ranks = ONE_RANK) -> dict:
    """Evaluate on one rank; give the summary."""
    fixed = ["--model", model, "--eval.dataset", tokens, "--eval.sequence_length", 64]
    return evaluate(parse("evaluate", [str(argument) for argument in (*fixed, *more)]), ranks)


def last_json(stdout: str) -> dict:
    """The last line of a command's standard output, which is JSON."""
    return json.loads(stdout.strip().splitlines()[-1])


def result_files(output: Path) -> dict[str, bytes]:
    """Every file of a run but the logs of times, by its path within the run."""
    files = sorted(path for path in output.rglob("*") if path.is_file() and not path.match("events*.jsonl"))
    return {str(path.relative_to(output)): path.read_bytes() for path in files}


def committed(output: Path) -> int:
    """Number of whole lines in a run's ledger."""
    ledger = output / "ledger.jsonl"
    return ledger.read_bytes().count(b"\n") if ledger.exists() else 0


def assert_nearly_equal(output: Path, reference: Path) -> None:
    """Sums in another order round differently: a code in two hundred may fall on the other side.

    And four times as many in the last block, whose input and gradients hold what came of that in those before.
    """
    for number, share in enumerate((0.995, 0.995, 0.98)):
        ours, theirs = (read_block(folder / "blocks" / f"block-{number:05d}.safetensors") for folder in
                        (output, reference))  # fmt: skip
        assert len(ours) == 7
        for name in ours:
            assert torch.allclose(ours[name].scale_OG, theirs[name].scale_OG, rtol=1e-2)
            assert (ours[name].codes_OI == theirs[name].codes_OI).float().mean() > share


def failing_launch(arguments: list[str], launch: Launcher = forked.ranks) -> list[str]:
    """Run on two ranks what must fail; give the lines that shardq itself printed, by whatever rank."""
    finished = launch(2, [LAUNCH / "quantize.py", *arguments])
    assert finished.returncode != 0
    assert 'launch/quantize.py", line' not in finished.stderr  # torchrun shows a stack of its own, the ranks none
    return [line for line in finished.stderr.splitlines() if line.startswith("shardq:")]


def start_and_kill(num_ranks: int, arguments: list[str], output: Path, after_blocks: int) -> int:
    """Start a run and SIGKILL its last rank as soon as some blocks are committed; give the exit code."""
    run = forked.start(num_ranks, [LAUNCH / "quantize.py", *arguments])
    deadline = time.monotonic() + tiny.LAUNCH_TIMEOUT_SECONDS
    while committed(output) < after_blocks and not run.is_over() and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(run.pids[-1], signal.SIGKILL)
    return run.wait().returncode


def ranks_of(torchrun_pid: int) -> list[int]:
    """Process ids of the ranks that a torchrun started."""
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(torchrun_pid)], capture_output=True, text=True)
    return [int(pid) for pid in listed.stdout.split()]
