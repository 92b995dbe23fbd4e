"""The log of times accounts for a whole run, on every rank."""

import json

import pytest

from runs import run_quantize

BLOCK_SPANS = ["load", "fp pass", "self-check", "start", "loss", "train", "fold", "loss", "quant pass", "commit"]
WAITING = {
    "prepare activations": {"output"},
    "load": {"input"},
    "fp pass": {"input", "output"},
    "likely tokens": {"input"},
    "loss": {"input"},
    "train": {"input"},
    "quant pass": {"input", "output"},
}


def events_of(output):
    """Events by rank, in the order in which they were written."""
    by_rank = {}
    for line in (output / "events.jsonl").read_text().splitlines():
        event = json.loads(line)
        by_rank.setdefault(event["rank"], []).append(event)
    return by_rank


@pytest.fixture(scope="module")
def run(two_ranks):
    """Events by rank of a run on two ranks, each a process of its own."""
    by_rank = events_of(two_ranks[0])
    assert sorted(by_rank) == [0, 1]
    return by_rank


def test_spans_follow_one_another_and_cover_every_block(run):
    for events in run.values():
        names = [(event["span"], event.get("block")) for event in events]
        first, *others = ([(name, block) for name in BLOCK_SPANS] for block in range(3))
        first.insert(3, ("compile", 0))  # the bench is built for the first block of a kind
        before = [("start-up", None), ("prepare", None), ("prepare activations", None)]
        others[1].insert(3, ("likely tokens", 2))  # to whose predictions the last block is trained
        others[1].remove(("quant pass", 2))  # nobody reads the last block's output
        assert names == [*before, *first, *others[0], *others[1], ("export", None), ("run", None)]


def test_spans_add_up_to_the_run(run):
    for events in run.values():
        [whole] = [event["seconds"] for event in events if event["span"] == "run"]
        [start_up] = [event["seconds"] for event in events if event["span"] == "start-up"]
        parts = sum(event["seconds"] for event in events if event["span"] != "run")
        assert whole - max(0.3, 0.1 * (whole - start_up)) < parts <= whole + 0.01
        assert 0 < start_up < whole


def test_waiting_is_noted_and_is_part_of_its_span(run):
    for events in run.values():
        for event in events:
            found = {name.removeprefix("waiting_for_") for name in event if name.startswith("waiting_for_")}
            assert found == WAITING.get(event["span"], set()), event
            assert all(event[f"waiting_for_{kind}"] >= 0 for kind in found)
            assert sum(event[f"waiting_for_{kind}"] for kind in found) <= event["seconds"] + 1e-4


def test_training_says_how_many_steps_it_took(run):
    for events in run.values():
        assert [event["iterations"] for event in events if event["span"] == "train"] == [24, 24, 48]


def test_run_without_training_has_no_training_spans(llama, token_file, tmp_path):
    run_quantize(llama, token_file, tmp_path / "out", "--quant.method", "rtn")
    names = {event["span"] for event in events_of(tmp_path / "out")[0]}
    assert not names & {"train", "fold"} and {"fp pass", "loss", "quant pass", "run"} <= names


def test_finished_run_that_is_asked_for_again_adds_nothing(llama, token_file, tmp_path):
    for _ in range(2):
        run_quantize(llama, token_file, tmp_path / "out", "--quant.method", "rtn")
        events = events_of(tmp_path / "out")[0]
        assert [event["span"] for event in events].count("run") == 1
