"""A checkpoint within a block: whole, made for what goes on now, one at a time."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shardq.matrix import Matrix
from shardq.optimize.best_iterate import BestIterate
from shardq.parallel.engines import engine_for
from shardq.parallel.options import ParallelOptions
from shardq.parallel.ranks import Ranks
from shardq.quant.integer_grid import IntegerGrid
from shardq.quant.quantized import QuantizedLinear
from shardq.rundir.folder import RunFolder
from shardq.training.checkpoint import Checkpoints, Progress, load, purpose_of, remove, save

GRID = IntegerGrid(bits=3, symmetric=False, group_size=4)
STATE = {"0.value": torch.randn(3, 4), "0.exp_avg": torch.randn(3, 4), "0.step": torch.tensor(5.0)}


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    (tmp_path / "manifest.json").write_text("{}")
    ranks = Ranks(0, 1, torch.device("cpu"))
    return Checkpoints(tmp_path, 3, engine_for(ParallelOptions(engine="local"), ranks))


NAMES = ("mlp.up", "attn.q", "mlp.down")  # in an order that is not theirs by name
GRIDS = {Matrix(name=name, shape=(3, 8)): GRID for name in NAMES}


def make_best(loss: float = 0.25) -> BestIterate:
    linears = {
        name: QuantizedLinear(torch.randint(-4, 4, (3, 8)).to(torch.int8), torch.rand(3, 2), torch.ones(3, 2), GRID)
        for name in NAMES
    }
    return BestIterate(linears, loss)


def save_one(checkpoints: Checkpoints, progress: Progress) -> None:
    save(checkpoints, purpose_of(checkpoints), 4, progress, STATE)


def load_one(checkpoints: Checkpoints) -> tuple:
    """What is loaded, and the lines that are said."""
    lines: list[str] = []
    return load(checkpoints, purpose_of(checkpoints), GRIDS, lines.append), lines


def names(checkpoints: Checkpoints) -> list[str]:
    return sorted(path.name for path in RunFolder(checkpoints.output).checkpoint.iterdir())


def test_state_and_progress_come_back_as_they_were(checkpoints):
    best = make_best()
    save_one(checkpoints, Progress(failed=1, done=6, best=best))
    (progress, state), lines = load_one(checkpoints)
    assert (progress.failed, progress.done, lines) == (1, 6, [])
    assert state.keys() == STATE.keys() and all(torch.equal(state[name], STATE[name]) for name in STATE)
    assert progress.best.loss == 0.25
    assert list(progress.best.linears) == list(best.linears)
    for name, linear in best.linears.items():
        found = progress.best.linears[name]
        assert found.grid == GRID and found.codes_OI.dtype == torch.int8
        for kind in ("codes_OI", "scale_OG", "zero_point_OG"):
            assert torch.equal(getattr(found, kind), getattr(linear, kind))


def test_nothing_is_loaded_where_there_is_none(checkpoints):
    assert load_one(checkpoints) == (None, [])


def test_next_one_replaces_the_one_before(checkpoints):
    for done in (3, 6, 12):
        save_one(checkpoints, Progress(done=done))
        assert names(checkpoints) == [f"block-00004-try-0-iteration-{done:06d}"]
    save_one(checkpoints, Progress(failed=1, done=3))
    assert names(checkpoints) == ["block-00004-try-1-iteration-000003"]
    assert load_one(checkpoints)[0][0].failed == 1
    remove(checkpoints.output)
    assert not RunFolder(checkpoints.output).checkpoint.exists()
    remove(checkpoints.output)


@pytest.mark.parametrize("file", ["state-00000.safetensors", "best.safetensors"])
@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing", "garbage"])
def test_damaged_one_is_not_used_and_named(checkpoints, damage, file):
    save_one(checkpoints, Progress(done=3, best=make_best()))
    folder = RunFolder(checkpoints.output).checkpoint / names(checkpoints)[0]
    content = (folder / file).read_bytes()
    if damage == "missing":
        (folder / file).unlink()
    else:
        changed = {"flipped": content[:-3] + bytes([content[-3] ^ 1]) + content[-2:], "truncated": content[:-1],
                   "garbage": b"garbage"}  # fmt: skip
        (folder / file).write_bytes(changed[damage])
    found, [line] = load_one(checkpoints)
    said = {"flipped": "damaged", "missing": "missing"}.get(damage, "truncated or not a safetensors file")
    assert found is None and line.startswith(f"{folder}: not used: ") and file in line and said in line


def test_whole_one_is_used_where_the_newer_is_not_whole(checkpoints, monkeypatch):
    """As a kill between the files of two ranks leaves it."""
    save_one(checkpoints, Progress(done=3))
    monkeypatch.setattr("shardq.training.checkpoint.shutil.rmtree", lambda *args, **options: None)
    save_one(checkpoints, Progress(done=6))
    newer = RunFolder(checkpoints.output).checkpoint / "block-00004-try-0-iteration-000006"
    (newer / "state-00000.safetensors").unlink()
    (progress, _), [line] = load_one(checkpoints)
    assert progress.done == 3 and line.startswith(f"{newer}: not used: ")


def test_one_that_was_made_for_something_else_is_not_used(checkpoints):
    save_one(checkpoints, Progress(done=3))
    [name], lines = names(checkpoints), []
    others = {
        "engine": (ParallelOptions(engine="local", reduce_dtype="bf16"), checkpoints.engine.ranks),
        "kind of device": (checkpoints.engine.options, Ranks(0, 1, torch.device("meta"))),
    }
    for differing, other in others.items():
        found, [line] = load_one(replace(checkpoints, engine=engine_for(*other)))
        assert found is None
        assert line == f"{RunFolder(checkpoints.output).checkpoint / name}: not used: made for another {differing}"
    assert load(checkpoints, purpose_of(checkpoints) | {"number of ranks": 2}, GRID, lines.append) is None
    assert lines[0].endswith("made for another number of ranks")
    assert load_one(checkpoints)[0]
    (checkpoints.output / "ledger.jsonl").write_text('{"block": 0}\n')
    found, [line] = load_one(checkpoints)
    assert found is None and "made for another block, run or finished blocks" in line


def test_engine_differs_where_the_settings_of_its_file_do(checkpoints, tmp_path):
    (tmp_path / "ds.json").write_text("{}")
    parallel = ParallelOptions(engine="zero3", deepspeed=str(tmp_path / "ds.json"))

    def purpose() -> dict:
        return purpose_of(replace(checkpoints, engine=engine_for(parallel, checkpoints.engine.ranks)))

    before = purpose()
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage3_param_persistence_threshold": 0}}')
    assert purpose() != before
