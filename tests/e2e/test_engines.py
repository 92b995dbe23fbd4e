"""Whole runs on two ranks under DeepSpeed's ZeRO, beside the run in which every rank holds everything."""

import pytest

import forked
from runs import (
    LAUNCH,
    assert_nearly_equal,
    committed,
    last_json,
    quantize_arguments,
    result_files,
    start_and_kill,
)


@pytest.mark.parametrize(
    ("engine", "more"),
    [
        ("rows", []),
        pytest.param("zero1", [], marks=pytest.mark.slow),
        ("zero2", ["--parallel.offload", "true"]),
        ("zero3", []),
    ],
)
def test_sharding_gives_the_result_of_whole_ranks(two_ranks, llama, token_file, tmp_path, engine, more):
    output = tmp_path / "out"
    arguments = quantize_arguments(llama, token_file, output, "--parallel.engine", engine, *more)
    finished = forked.ranks(2, [LAUNCH / "quantize.py", *arguments])
    assert finished.returncode == 0, finished.stderr
    expected = last_json(two_ranks[1])
    assert last_json(finished.stdout)["loss_after"] == pytest.approx(expected["loss_after"], rel=0.01)
    assert_nearly_equal(output, two_ranks[0])


def test_ranks_hold_everything_where_that_fits_and_the_run_says_so(two_ranks):
    assert "parallel.engine: allreduce (allreduce takes 0.00 GiB a rank, of" in two_ranks[1]


@pytest.mark.slow
def test_best_iterate_under_zero3_and_a_resume_after_a_kill_give_the_same_bytes(llama, token_file, tmp_path):
    more = ["--parallel.engine", "zero3", "--optimize.held_out", 2]
    whole = quantize_arguments(llama, token_file, tmp_path / "whole", *more)
    assert forked.ranks(2, [LAUNCH / "quantize.py", *whole]).returncode == 0
    killed = quantize_arguments(llama, token_file, tmp_path / "killed", *more)
    assert start_and_kill(2, killed, tmp_path / "killed", after_blocks=1) != 0
    assert 1 <= committed(tmp_path / "killed") <= 3
    assert forked.ranks(2, [LAUNCH / "quantize.py", *killed]).returncode == 0
    assert result_files(tmp_path / "killed") == result_files(tmp_path / "whole")
