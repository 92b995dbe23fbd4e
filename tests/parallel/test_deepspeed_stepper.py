"""DeepSpeed's settings: the engine's own, and what a user's file adds."""

from pathlib import Path

import pytest

from shardq.errors import ConfigError
from shardq.parallel.deepspeed_stepper import deepspeed_settings
from shardq.parallel.options import ParallelOptions


def test_file_adds_to_what_the_engine_sets(tmp_path: Path):
    file = tmp_path / "ds.json"
    file.write_text('{"zero_optimization": {"reduce_bucket_size": 1000}, "wall_clock_breakdown": true}')
    settings = deepspeed_settings(ParallelOptions(engine="zero2", offload=True, deepspeed=str(file)))
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
        deepspeed_settings(ParallelOptions(engine="zero2", deepspeed=str(file)))


def test_missing_file_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="absent.json is no JSON file"):
        deepspeed_settings(ParallelOptions(engine="zero2", deepspeed=str(tmp_path / "absent.json")))
