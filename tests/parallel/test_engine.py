"""Which engines options mean, and what each demands of them."""

from pathlib import Path

import pytest
import torch

from shardq.parallel.engine import Engine
from shardq.parallel.engines import candidates, engine_for
from shardq.parallel.options import ParallelOptions
from shardq.parallel.ranks import Ranks

ZERO = ("zero1", "zero2", "zero3")


def ranks_of(world_size: int) -> Ranks:
    return Ranks(world_size - 1, world_size, torch.device("cpu"))


def refused(engine: Engine) -> list[str]:
    """The options that the engine does not take."""
    return [option for holds, option, _, _ in engine.demands() if not holds]


@pytest.mark.parametrize(("world_size", "names"), [(1, ["local"]), (2, ["allreduce", "rows"])])
def test_auto_means_one_rank_alone_or_several_that_hold_everything_or_their_rows(world_size: int, names: list[str]):
    engines = candidates(ParallelOptions(reduce_dtype="bf16"), ranks_of(world_size))
    assert [engine.options for engine in engines] == [ParallelOptions(engine=n, reduce_dtype="bf16") for n in names]


@pytest.mark.parametrize("name", ["local", "allreduce", "rows", *ZERO])
@pytest.mark.parametrize("world_size", [1, 2])
def test_each_engine_says_what_it_does_not_take(name: str, world_size: int, tmp_path: Path):
    file = tmp_path / "ds.json"
    file.write_text("{}")
    is_zero, ranks = name in ZERO, ranks_of(world_size)
    number = ["parallel.engine"] if (name, world_size) in (("local", 2), ("allreduce", 1)) else []
    assert refused(engine_for(ParallelOptions(engine=name), ranks)) == number
    more = engine_for(ParallelOptions(engine=name, offload=True, deepspeed=str(file)), ranks)
    assert refused(more) == (number if is_zero else [*number, "parallel.offload", "parallel.deepspeed"])


@pytest.mark.parametrize("name", ["local", "allreduce", "rows", *ZERO])
def test_training_state_is_saved_by_who_has_it_under_what_it_was_made_with(name: str):
    world_size = 1 if name == "local" else 3
    engine = engine_for(ParallelOptions(engine=name), ranks_of(world_size))
    assert engine.writer == (0 if name in ("local", "allreduce") else 2)
    made_with = engine.made_with()
    assert made_with["engine"] == name and "deepspeed" not in made_with
    assert ("zero_optimization" in made_with) == (name in ZERO)
