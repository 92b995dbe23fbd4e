"""A rank that fails in the middle of a step ends the whole run soon, by name, and the same command goes on."""

import time
from dataclasses import replace

import pytest

import failing_quantize
import forked
import tiny
from runs import LAUNCH, ONE_RANK, committed, quantize_arguments, result_files
from shardq.cli import parse
from shardq.commands.quantize import quantize
from shardq.liveness.stall import Pace
from shardq.logs import Display
from shardq.optimize.stepper import LocalStepper
from shardq.training import checkpoint
from shardq.training import tries as training

LIMIT_SECONDS = 30
CORE_LIMIT_SECONDS = 90  # of a rank that is known by the time of a core that it takes, which other programs may want
FAILURES = {
    "fault": "failed: ZeroDivisionError: division by zero",
    "error": "failed: disk of one rank is full",
    "memory": "failed: out of memory (",
    "SIGKILL": "ended without a message: it was killed",
    "SIGSTOP": "has not been heard of for 20 s",
}
HANGS = {
    "still": "failed: stands still at distill.py:",
    "endless": "failed: computes without end at distill.py:",
}


def fail(how, who, arguments, folder, limit_seconds=LIMIT_SECONDS):
    """Let a run fail, in time and by name; give the lines that the ranks wrote."""
    failed_at = folder / "failed-at"
    script = [failing_quantize.__file__, how, str(who), failed_at, *arguments]
    launch = tiny.torchrun if how == "SIGKILL" else forked.ranks  # it ends the others too, and prints a stack
    finished = launch(2, script)
    assert failed_at.exists(), finished.stderr
    assert time.time() - float(failed_at.read_text()) < limit_seconds
    assert finished.returncode != 0
    lines = [line for line in finished.stderr.splitlines() if line.startswith(("shardq:", "[rank"))]
    assert lines[-1].startswith(f"shardq: [rank {1 - who}] rank {who} {(FAILURES | HANGS)[how]}"), finished.stderr
    return lines


@pytest.mark.parametrize("who", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_run_goes_on_after_every_failure_of_a_rank(llama, token_file, two_ranks, tmp_path, who):
    """One run that fails in every way, one after the other, and is then let finish."""
    arguments, output = quantize_arguments(llama, token_file, tmp_path / "out"), tmp_path / "out"
    for how in FAILURES:
        lines = fail(how, who, arguments, tmp_path)
        assert committed(output) == 1
        if how in ("error", "memory"):
            assert len(lines) == 2 and lines[0].startswith(f"shardq: [rank {who}] {FAILURES[how][len('failed: ') :]}")
        if how == "memory":
            assert "--optimize.micro_batch, --optimize.memory_gib or --calib.sequence_length" in lines[0]
        if how == "fault":
            assert lines[-2] == f"[rank{who}]: ZeroDivisionError: division by zero"
    finished = forked.ranks(2, [LAUNCH / "quantize.py", *arguments])
    assert finished.returncode == 0, finished.stderr
    assert "resuming" in finished.stdout and "1 of 3 blocks are done" in finished.stdout
    assert result_files(output) == result_files(two_ranks[0])


@pytest.mark.slow
@pytest.mark.parametrize("who", [0, 1])
@pytest.mark.parametrize("how", HANGS)
def test_rank_that_hangs_in_a_step_ends_the_run(llama, token_file, tmp_path, how, who):
    limit_seconds = CORE_LIMIT_SECONDS if how == "endless" else LIMIT_SECONDS
    lines = fail(how, who, quantize_arguments(llama, token_file, tmp_path / "out"), tmp_path, limit_seconds)
    assert len(lines) == 2 and lines[0].startswith(f"shardq: [rank {who}] {HANGS[how][len('failed: ') :]}")


def test_steps_are_timed_without_what_comes_between_them(llama, token_file, tmp_path, monkeypatch):
    """The terminal, looks at the held-out samples and checkpoints may all take any time."""
    pace, within = Pace(), {}

    def note(owner: object, name: str) -> None:
        call = getattr(owner, name)

        def noted(*args: object) -> object:
            within.setdefault(name, []).append(pace.step is not None)
            return call(*args)

        monkeypatch.setattr(owner, name, noted)

    note(LocalStepper, "step")
    note(Display, "advance_iteration")
    note(training, "agreed_loss")
    note(checkpoint, "save")
    more = ["--optimize.held_out", 2, "--checkpoint.every_iterations", 7]
    config = parse("quantize", quantize_arguments(llama, token_file, tmp_path / "out", *more))
    quantize(config, replace(ONE_RANK, pace=pace))
    rehearsed, *trained = within.pop("step")
    assert not rehearsed and trained and all(trained)  # the rehearsal compiles, which may take any time too
    assert within.keys() == {"advance_iteration", "agreed_loss", "save"} and not any(map(any, within.values()))
