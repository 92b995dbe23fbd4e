"""Runs of the command line's own functions, in this process, as rank 0 of 1."""

import json
from pathlib import Path

import torch

from shardq.cli import parse
from shardq.parallel.ranks import Ranks
from shardq.pipeline.evaluate import evaluate
from shardq.pipeline.run import quantize

LAUNCH = Path(__file__).parents[2] / "launch"
ONE_RANK = Ranks(0, 1, torch.device("cpu"))


def quantize_arguments(model: Path, tokens: Path, output: Path, *more: object) -> list[str]:
    """Arguments of a short run on the tiny model and token file, the same on every machine; later ones win."""
    fixed = ["--model", model, "--output", output, "--calib.dataset", tokens, "--calib.samples", 8,
             "--calib.sequence_length", 64, "--optimize.preset", "aimet", "--optimize.iterations", 24,
             "--optimize.batch_size", 2, "--optimize.weight_lr", 3e-3, "--optimize.compile", "off",
             "--optimize.precision", "float32"]  # fmt: skip
    return [str(argument) for argument in (*fixed, *more)]


def run_quantize(model: Path, tokens: Path, output: Path, *more: object) -> dict:
    """Quantize on one rank; give the summary."""
    return quantize(parse("quantize", quantize_arguments(model, tokens, output, *more)), ONE_RANK)


def run_evaluate(model: Path, tokens: Path, *more: object) -> dict:
    """Evaluate on one rank; give the summary."""
    fixed = ["--model", model, "--eval.dataset", tokens, "--eval.sequence_length", 64]
    return evaluate(parse("evaluate", [str(argument) for argument in (*fixed, *more)]), ONE_RANK)


def last_json(stdout: str) -> dict:
    """The last line of a command's standard output, which is JSON."""
    return json.loads(stdout.strip().splitlines()[-1])


def result_files(output: Path) -> dict[str, bytes]:
    """Every file of a run but the log of times, by its path within the run."""
    files = sorted(path for path in output.rglob("*") if path.is_file() and path.name != "events.jsonl")
    return {str(path.relative_to(output)): path.read_bytes() for path in files}


def committed(output: Path) -> int:
    """Number of whole lines in a run's ledger."""
    ledger = output / "ledger.jsonl"
    return ledger.read_bytes().count(b"\n") if ledger.exists() else 0
