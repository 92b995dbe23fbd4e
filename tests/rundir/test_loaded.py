"""A run's folder as an object, against what was written there."""

import json
from pathlib import Path

import pytest
import torch

import shardq
import tiny
from shardq.errors import ResumeError
from shardq.files import write_json
from shardq.formats.block_file import write_block
from shardq.logs import Event, Events
from shardq.quant.integer_grid import IntegerGrid
from shardq.rundir.folder import RunFolder
from shardq.rundir.ledger import commit, complete
from shardq.rundir.record import RunRecord

GRID = IntegerGrid(bits=4, group_size=8)
OPTIONS = {"seed": 3, "quant": {"bits": 4, "group_size": 8}}


@pytest.fixture(name="linears")
def _linears() -> list[dict]:
    """Of two blocks; nothing of the first one is quantized."""
    return [{}, {f"model.layers.1.mlp.experts.1.{name}": tiny.random_linear(GRID, (6, 16)) for name in ("up", "down")}]


@pytest.fixture(name="output")
def _output(tmp_path: Path, linears: list[dict]) -> Path:
    """Folder of a run of two blocks, on two ranks, which lacks only what completes it."""
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    write_json(folder.manifest, {"options": OPTIONS})
    events = [Events(folder.path / "events.jsonl", 0), Events(folder.path / "events-rank-1.jsonl", 1)]
    for number, of_block in enumerate(linears):
        folder.block(number).parent.mkdir(exist_ok=True)
        write_block(folder.block(number), of_block)
        for log in events:
            log.record("load", 0.25, block=number)
            for _ in range(2):  # a run that was killed in between
                log.record("train", 1.5 + number, block=number, iterations=4)
        commit(folder.path, number, [folder.block(number)], loss_before=0.5, loss_after=0.25, source={"a": "b"})
    events[0].record("export", 9.0)
    return folder.path


def test_blocks_are_what_was_committed(output, linears):
    run = shardq.load_run(output)
    assert not run.is_finished and run.options == OPTIONS
    assert [(block.index, block.name) for block in run.blocks] == [(0, "model.layers.0"), (1, "model.layers.1")]
    assert [set(block.grids) for block in run.blocks] == [set(), set(linears[1])]
    assert set(run.blocks[1].grids.values()) == {GRID}
    assert run.blocks[1].facts == {"loss_before": 0.5, "loss_after": 0.25}
    assert run.blocks[1].seconds == {"load": 0.25, "train": 5.0}
    assert run.blocks[1].num_bytes == run.blocks[1].path.stat().st_size


def test_codes_scales_and_weights_are_those_of_the_file(output, linears):
    block = shardq.load_run(str(output)).blocks[1]
    for name, matrix in block.matrices().items():
        assert torch.equal(matrix.codes_OI, linears[1][name].codes_OI)
        assert torch.equal(matrix.scale_OG, linears[1][name].scale_OG)
        scale_OI = matrix.scale_OG.repeat_interleave(8, 1)
        assert torch.equal(block.weights()[name], matrix.codes_OI * scale_OI)
    assert block.weights(torch.bfloat16)[name].dtype == torch.bfloat16


def test_finished_run_says_so(output):
    complete(output, [])
    assert shardq.load_run(output).is_finished


def test_events_are_read_as_they_were_written(output):
    [first, *_, last] = [event for event in RunRecord.read(output).events() if event.rank == 0]
    assert first == Event("load", 0.25, 0, first.time, {"block": 0}) and first.time > 0
    assert last == Event("export", 9.0, 0, last.time, {})
    assert sum(event.rank == 1 for event in RunRecord.read(output).events()) == 6


def test_torn_line_is_no_event_and_a_damaged_one_is_named(output):
    log = output / "events.jsonl"
    before = RunRecord.read(output).events()
    log.write_text(log.read_text() + json.dumps({"span": "run"})[:-3])
    assert RunRecord.read(output).events() == before
    for text in ("nonsense", '{"span": "run"}', "[]"):
        log.write_text(text + "\n")
        with pytest.raises(ResumeError, match=r"events.jsonl: line 1 is no event; delete the line"):
            RunRecord.read(output).events()


def test_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(ResumeError, match="no such folder"):
        shardq.load_run(tmp_path / "gone")
    with pytest.raises(ResumeError, match="holds no run of shardq"):
        shardq.load_run(tmp_path)
