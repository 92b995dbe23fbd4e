"""Agreement between real processes: two ranks started by torchrun write down what they got."""

import json
from pathlib import Path

import pytest
import torch

import collectives_worker as worker
import forked
from shardq.errors import ConfigError
from shardq.parallel.collectives import barrier, max_over_ranks, on_rank_zero, sum_over_ranks, together
from shardq.parallel.ranks import Ranks

ALONE = Ranks(rank=0, world_size=1, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What both ranks left behind; one launch serves all tests."""
    folder = tmp_path_factory.mktemp("ranks")
    finished = forked.ranks(2, [worker.__file__, folder])
    assert finished.returncode == 0, finished.stderr
    return folder


@pytest.fixture(scope="module")
def notes(folder: Path) -> list[dict]:
    """Notes of rank 0 and of rank 1."""
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2)]


def both(notes: list[dict], name: str) -> list:
    """One entry of both ranks' notes."""
    return [note[name] for note in notes]


def test_each_rank_knows_its_place(notes: list[dict]):
    assert both(notes, "ranks") == [[0, 2, "cpu"], [1, 2, "cpu"]]


class TestOnRankZero:
    def test_result_reaches_every_rank_and_the_work_is_done_once(self, notes: list[dict]):
        assert both(notes, "from rank 0") == [{"result": {"of": 0}}] * 2
        assert both(notes, "calls of rank 0's work") == [1, 0]

    def test_work_without_result_is_no_error(self, notes: list[dict]):
        assert both(notes, "nothing from rank 0") == [{"result": None}] * 2

    def test_error_is_raised_on_every_rank_as_agreed(self, notes: list[dict]):
        error = {"error": "StorageError", "text": "disk of rank 0 is full", "agreed": True, "where": ""}
        assert both(notes, "error of rank 0") == [error] * 2


class TestTogether:
    def test_each_rank_gets_its_own_result(self, notes: list[dict]):
        assert both(notes, "own results") == [{"result": "rank 0"}, {"result": "rank 1"}]

    def test_error_of_one_rank_is_raised_on_every_rank_as_agreed(self, notes: list[dict]):
        error = {"error": "ConfigError", "text": "rank 1 fails", "agreed": True, "where": "rank 1"}
        assert both(notes, "error of rank 1") == [error] * 2

    def test_of_several_errors_the_lowest_ranks_is_raised(self, notes: list[dict]):
        error = {"error": "ConfigError", "text": "rank 0 fails", "agreed": True, "where": ""}
        assert both(notes, "errors of both") == [error] * 2


class TestHosts:
    def test_work_is_done_by_the_first_rank_of_each_host(self, notes: list[dict]):
        assert both(notes, "one host") == [{"result": "of rank 0"}] * 2
        assert both(notes, "two hosts") == [{"result": "of rank 0"}, {"result": "of rank 1"}]

    def test_error_of_one_host_is_raised_on_all(self, notes: list[dict]):
        error = {"error": "StorageError", "text": "no model on the second host", "agreed": True, "where": "rank 1"}
        assert both(notes, "error of a host") == [error] * 2

    def test_folder_that_all_ranks_see_is_shared(self, notes: list[dict], folder: Path):
        assert both(notes, "shared folder") == [{"result": None}] * 2
        assert list(folder.glob("token*")) == []

    def test_folders_of_their_own_are_refused_by_name(self, notes: list[dict], folder: Path):
        error = notes[0]["own folders"]
        assert error["error"] == "StorageError" and error["agreed"]
        assert error["text"].startswith(f"{folder}/own-1: rank 1 does not find there what rank 0 has written; --output")
        assert both(notes, "own folders") == [error] * 2
        assert both(notes, "left in own folders") == [[], []]


class TestNumbers:
    def test_sums_are_made_in_double_precision(self, notes: list[dict]):
        assert both(notes, "sums") == [[0.1 + 0.2, 2.0**53, -10.0]] * 2

    def test_largest_number_is_found(self, notes: list[dict]):
        assert both(notes, "largest") == [3.5] * 2

    def test_tensors_are_added_up(self, notes: list[dict]):
        assert both(notes, "added") == [[[[3.0] * 3] * 2, [10.0, -4.0]]] * 2

    def test_least_and_greatest_are_found_element_by_element(self, notes: list[dict]):
        assert both(notes, "min") == [[[-1.0, -2.0], 5]] * 2
        assert both(notes, "max") == [[[1.0, 2.0], 6]] * 2


def test_nobody_leaves_a_barrier_before_the_last_has_come(notes: list[dict]):
    times = both(notes, "barrier")
    last = max(rank["arrived"] for rank in times)
    assert last - min(rank["arrived"] for rank in times) > worker.LATE_SECONDS / 2, "nobody was late"
    assert all(rank["left"] >= last for rank in times)


@pytest.mark.parametrize(
    "doing",
    [
        "waiting for rank 0",
        "comparing results",
        "putting numbers together",
    ],
)
def test_lost_rank_is_reported_in_one_line(notes: list[dict], doing: str):
    outcome = notes[0]["lost"][doing]
    assert outcome["error"] == "RankError" and not outcome["agreed"]
    assert outcome["text"].startswith(f"lost contact with another rank while {doing} (")
    assert "\n" not in outcome["text"]


class TestOneRank:
    """Without other ranks everything is the plain operation; no process group exists here."""

    def test_results_and_numbers_pass_through(self):
        assert on_rank_zero(ALONE, lambda: "result") == "result"
        assert together(ALONE, lambda: "result") == "result"
        assert sum_over_ranks(ALONE, [1.5, 2.0]) == [1.5, 2.0]
        assert max_over_ranks(ALONE, 7.0) == 7.0
        assert barrier(ALONE) is None

    @pytest.mark.parametrize("agree", [on_rank_zero, together])
    def test_error_is_the_same_object_and_agreed(self, agree):
        error = ConfigError("wrong")
        with pytest.raises(ConfigError) as caught:
            agree(ALONE, lambda: worker.fail(error))
        assert caught.value is error and error.agreed
