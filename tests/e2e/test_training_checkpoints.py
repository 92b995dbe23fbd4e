"""A run that is killed within a block goes on from the checkpoint there and ends with an uninterrupted run's bytes."""

import json

import pytest

import checkpoint_kills as kills
import forked
from runs import run_quantize

AFTER = {  # case: steps after the kill in the block that was killed
    "step": kills.STEPS - kills.EVERY,
    "writing": kills.STEPS - kills.EVERY,
    "removing": kills.STEPS - 2 * kills.EVERY,
}


@pytest.mark.parametrize(
    ("engine", "num_ranks", "cases"),
    [
        ("local", 1, ["step", "flipped"]),
        ("allreduce", 2, ["step"]),
        ("zero2", 2, ["writing"]),
        pytest.param("local", 1, ["writing", "removing", *kills.DAMAGES], marks=pytest.mark.slow),
        pytest.param("allreduce", 2, ["writing", "removing", "missing"], marks=pytest.mark.slow),
        pytest.param("zero2", 2, ["step", "removing", *kills.DAMAGES], marks=pytest.mark.slow),
        pytest.param("zero3", 2, ["step", "writing", "missing"], marks=pytest.mark.slow),
    ],
)
def test_killed_run_goes_on_within_the_block(tmp_path, engine, num_ranks, cases):
    told = forked.told_by(kills.__file__, tmp_path, engine, num_ranks, *cases)
    assert [case["case"] for case in told] == cases
    for case in told:
        assert case["wrong"] == "", case
        # A damaged one is not used: the block is trained anew.
        assert case["steps"] == [AFTER.get(case["case"], kills.STEPS)]
        newer = case["case"] == "removing" or (case["case"], engine[:4]) == ("writing", "zero")
        both = ["block-00001-try-0-iteration-000003", "block-00001-try-0-iteration-000006"]
        assert case["folders"] == both[: 1 + newer]


def test_checkpoints_change_nothing_and_are_gone_in_the_end(llama, token_file, tmp_path):
    results = []
    for every in (0, 1, 5):
        output = tmp_path / f"every-{every}"
        run_quantize(llama, token_file, output, "--checkpoint.every_iterations", every, "--optimize.iterations", 8)
        results.append({path.name: path.read_bytes() for path in output.rglob("*.safetensors")})
        assert not (output / "checkpoint").exists()
        events = [json.loads(line) for line in (output / "events.jsonl").read_text().splitlines()]
        assert all(("waiting_for_checkpoint" in event) == (every > 0) for event in events if event["span"] == "train")
    assert results[0] == results[1] == results[2]
