"""DeepSpeed's settings: the engine's own, and what a user's file adds."""

from pathlib import Path

import pytest
import torch

from shardq.errors import ConfigError
from shardq.parallel.options import ParallelOptions
from shardq.parallel.ranks import Ranks
from shardq.parallel.zero import Zero


def settings_of(file: Path, **more: object) -> dict:
    options = ParallelOptions(engine="zero2", deepspeed=str(file), **more)
    return Zero(options, Ranks(0, 2, torch.device("cpu"))).settings


def test_file_adds_to_what_the_engine_sets(tmp_path: Path):
    file = tmp_path / "ds.json"
    file.write_text('{"zero_optimization": {"reduce_bucket_size": 1000}, "wall_clock_breakdown": true}')
    settings = settings_of(file, offload=True)
    zero = settings["zero_optimization"]
    assert (zero["stage"], zero["reduce_bucket_size"], zero["offload_optimizer"]) == (2, 1000, {"device": "cpu"})
    assert settings["wall_clock_breakdown"] is True


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('{"bf16": {"enabled": true}}', "sets bf16"),
        ('{"zero_optimization": {"stage": 1}}', "sets zero_optimization.stage"),
        ("[1]", "holds no JSON object"),
        ('{"zero_optimization": 2}', "holds no JSON object"),
        ("stage: 2", "is no JSON file"),
    ],
)
def test_file_that_contradicts_or_is_none_is_refused(tmp_path: Path, text: str, named: str):
    file = tmp_path / "ds.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match=named):
        settings_of(file)


def test_missing_file_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="absent.json: cannot be read .*check parallel.deepspeed"):
        settings_of(tmp_path / "absent.json")
