"""Numbers that are not finite: agreed by all ranks before the step, tried again at lower rates, never in the output."""

import json
from pathlib import Path

import pytest

import forked
import not_finite_runs
from runs import result_files, run_quantize
from shardq.commands.verify import find_faults
from shardq.optimize.stepper import LocalStepper

WILD = ["--optimize.grid_lr", 60, "--optimize.iterations", 10]  # two tries break; the third one does not


@pytest.mark.parametrize(
    ("engine", "cases"),
    [
        ("allreduce", ["loss", "always", "gradient"]),
        ("zero2", ["loss"]),
        pytest.param("zero1", ["loss", "always", "gradient"], marks=pytest.mark.slow),
        pytest.param("zero2", ["always", "gradient"], marks=pytest.mark.slow),
        pytest.param("zero3", ["loss", "always", "gradient"], marks=pytest.mark.slow),
    ],
)
def test_number_of_one_rank_is_agreed_by_all(tmp_path, engine, cases):
    told = forked.told_by(not_finite_runs.__file__, tmp_path, engine, 2, *cases)
    assert [case["case"] for case in told] == cases
    for case in told:
        first, second, _ = case["entries"]
        assert case["statuses"] == [0, 0] and case["faults"] == []
        assert "failed_tries" not in first
        always = case["case"] == "always"
        assert (second["failed_tries"], second["gave_up"]) == ((3, True) if always else (1, False))
        before, after = losses_of(second)
        assert after < before  # of three steps at the least


def losses_of(entry: dict) -> list[float]:
    """A block's loss, or its predictions' divergence, before and after training."""
    return [
        entry[key] for key in ("loss_before", "loss_after", "divergence_before", "divergence_after") if key in entry
    ]


def entries_of(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "ledger.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("more", "tries"),
    [
        (["--optimize.weight_lr", 1e4], 3),
        (["--optimize.weight_lr", 1e4, "--optimize.held_out", 2, "--optimize.retries", 1], 2),
        (["--quant.method", "lwc", "--optimize.grid_lr", 1e3, "--optimize.retries", 0], 1),
    ],
)
def test_block_that_cannot_be_trained_is_left_at_its_start_and_listed(llama, token_file, tmp_path, capsys, more, tries):
    output = tmp_path / "out"
    run_quantize(llama, token_file, output, "--optimize.iterations", 5, *more)
    for entry in entries_of(output)[:3]:
        assert (entry["failed_tries"], entry["gave_up"]) == (tries, True)
        before, after = losses_of(entry)
        assert after == before
    assert not any(find_faults(output)[0].values())
    shown = capsys.readouterr().out
    said = f"numbers were not finite in {tries} training(s), left at its best finite iterate"
    assert shown.count(f"MiB; {said}\n") == 3
    assert [f"  model.layers.{number}: {said}\n" in shown for number in range(3)] == [True] * 3
    assert shown.count("trained again from its start") == 3 * (tries - 1)


def test_block_is_trained_at_lower_rates_and_is_no_worse_than_its_start(llama, token_file, tmp_path, capsys):
    run_quantize(llama, token_file, tmp_path / "out", *WILD)
    for entry in entries_of(tmp_path / "out")[:3]:
        assert (entry["failed_tries"], entry["gave_up"]) == (2, False)
        before, after = losses_of(entry)
        assert after <= before
    shown = capsys.readouterr().out
    assert shown.count("learning rates times 0.5") == shown.count("learning rates times 0.25") == 3


class Killed(BaseException):
    """As far as the run's code can tell."""


def test_run_that_is_killed_in_a_later_try_goes_on_there(llama, token_file, tmp_path, monkeypatch):
    run_quantize(llama, token_file, tmp_path / "whole", *WILD)
    step, starts, calls = LocalStepper.step, [], []
    start = LocalStepper.start

    def start_noted(stepper: LocalStepper, iterations: int | None = None, rate: float = 1.0) -> None:
        starts.append(rate)
        calls.clear()
        start(stepper, iterations, rate)

    def step_or_die(stepper: LocalStepper) -> None:
        calls.append(None)
        if starts[-1] == 0.25 and len(calls) == 7:
            raise Killed
        step(stepper)

    with monkeypatch.context() as patched:
        patched.setattr(LocalStepper, "start", start_noted)
        patched.setattr(LocalStepper, "step", step_or_die)
        with pytest.raises(Killed):
            run_quantize(llama, token_file, tmp_path / "out", *WILD, "--checkpoint.every_iterations", 4)
        starts.clear()
        patched.setattr(LocalStepper, "step", step)
        run_quantize(llama, token_file, tmp_path / "out", *WILD)
    rehearsal = 1.0
    assert starts == [rehearsal, 0.25, 1.0, 0.5, 0.25, 1.0, 0.5, 0.25]
    assert result_files(tmp_path / "out") == result_files(tmp_path / "whole")
