"""Gradients averaged over real processes: what one rank gives on the joined batch, sent while backward goes on."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import allreduce_worker as worker
import forked
from shardq.optimize.stepper import LocalStepper


@pytest.fixture(scope="module", params=[2, 4])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the ranks left behind."""
    folder = tmp_path_factory.mktemp(f"ranks-{request.param}")
    finished = forked.ranks(request.param, [worker.__file__, folder])
    assert finished.returncode == 0, finished.stderr
    return folder


@pytest.fixture
def notes(folder: Path) -> list[dict]:
    """Every rank's notes."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("rank-*.json"))]


def test_ranks_train_as_one_does_on_the_joined_batch(folder: Path):
    block, quantizer = worker.make_block(worker.Kernels())
    expected = worker.train(block, quantizer, LocalStepper(quantizer, worker.OPTIONS), worker.make_batches())
    trained = load_file(folder / "trained-0.safetensors")
    assert trained.keys() == expected.keys() and len(expected) == 12
    for name, parameter in expected.items():
        assert parameter.abs().max() > 1e-3, f"{name} has hardly moved, so nothing is compared"
        # Adam also follows gradients that are nothing but rounding: single values differ.
        assert (trained[name] - parameter).norm() < 1e-3 * parameter.norm(), name


def test_all_ranks_end_with_the_same_bits(folder: Path):
    first, *others = (load_file(path) for path in sorted(folder.glob("trained-*")))
    assert others
    assert all(torch.equal(first[name], other[name]) for other in others for name in first)


def test_large_gradients_leave_while_backward_goes_on_and_small_ones_together(notes: list[dict]):
    """Backward comes to the last linear first; its s2 has left before the gradient of the one before is computed."""
    large, small = worker.BUCKET_SIZE, worker.WIDTH**2
    rows = 2 * worker.WIDTH + worker.INNER  # each with beta, gamma, s3
    expected = [
        ["computed", large], ["left", large], ["computed", large], ["left", large], ["computed", small],
        ["left", small + 3 * rows],
    ]  # fmt: skip
    assert all(note["log"] == expected for note in notes)


def test_lost_rank_is_reported_in_one_line(notes: list[dict]):
    assert notes[0]["lost"].startswith("lost contact with another rank while averaging gradients (")
    assert "\n" not in notes[0]["lost"]
