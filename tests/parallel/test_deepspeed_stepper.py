"""Every ZeRO engine on real processes gives what one rank gives on the joined batches."""

import json
from pathlib import Path

import deepspeed_worker as worker
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import tiny
from shardq.errors import ConfigError
from shardq.optimize.stepper import LocalStepper, trainable
from shardq.parallel.deepspeed_stepper import deepspeed_settings
from shardq.parallel.options import ParallelOptions

LAUNCHES = [("zero1", 2, ""), ("zero2", 2, ""), ("zero3", 2, ""), ("zero2", 4, ""), ("zero3", 4, ""),
            ("zero2", 2, "offload"), ("zero3", 2, "offload"), ("zero2", 1, "")]  # fmt: skip


@pytest.fixture(scope="module")
def expected() -> list[dict[str, Tensor]]:
    """Codes and scales of every block, trained by one rank on the joined batches."""
    block, quantizer = worker.make_quantizer()
    quantizer.start(worker.make_source(block, 0))
    stepper = LocalStepper(quantizer, worker.OPTIONS)
    trained = [worker.train(block, quantizer, stepper, number, slice(None)) for number in range(worker.NUM_BLOCKS)]
    return [worker.tensors_of(linears) for linears in trained]


@pytest.mark.parametrize(("engine", "num_ranks", "offload"), LAUNCHES)
def test_engine_gives_what_one_rank_gives(
    engine: str, num_ranks: int, offload: str, expected: list[dict[str, Tensor]], tmp_path: Path
):
    finished = tiny.torchrun(num_ranks, [worker.__file__, tmp_path, engine, offload])
    assert finished.returncode == 0, finished.stderr
    for number, wanted in enumerate(expected):
        for rank in range(num_ranks):
            got = load_file(tmp_path / f"block-{number}-{rank}.safetensors")
            for name, tensor in wanted.items():
                if name.endswith("scale"):
                    torch.testing.assert_close(got[name], tensor, rtol=1e-4, atol=0)
                else:
                    assert (got[name] == tensor).float().mean() > 0.999, f"block {number}, rank {rank}, {name}"
    notes = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(num_ranks)]
    for note in notes:
        assert_is_sharded(note, engine, num_ranks)
        assert note["footprints"][1] == note["footprints"][-1]


def assert_is_sharded(note: dict, engine: str, num_ranks: int) -> None:
    """Moments are spread over the ranks; with ZeRO 3 large parameters and the frozen weight are too."""
    _, quantizer = worker.make_quantizer()
    num_trained = sum(parameter.numel() for group in trainable(quantizer) for parameter in group)
    assert note["moments"] == pytest.approx(num_trained / num_ranks, rel=0.02)
    if engine == "zero3":
        assert note["held"] < 0.2 * num_trained  # small ones stay whole
    else:
        assert note["held"] > num_trained


class TestSettings:
    def test_file_adds_to_what_the_engine_sets(self, tmp_path: Path):
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
    def test_file_that_contradicts_or_is_none_is_refused(self, tmp_path: Path, text: str, named: str):
        file = tmp_path / "ds.json"
        file.write_text(text)
        with pytest.raises(ConfigError, match=named):
            deepspeed_settings(ParallelOptions(engine="zero2", deepspeed=str(file)))

    def test_missing_file_is_refused(self, tmp_path: Path):
        with pytest.raises(ConfigError, match="absent.json is no JSON file"):
            deepspeed_settings(ParallelOptions(engine="zero2", deepspeed=str(tmp_path / "absent.json")))
