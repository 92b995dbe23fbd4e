"""Presets: they fill in what was not given and nothing else."""

import dataclasses
from typing import get_args, get_type_hints

import pytest
import torch

from shardq.optimize.options import PRESETS, OptimizeOptions, resolved

# AIMET's own defaults for AdaScale, one sample a rank, and what a device without bfloat16 computes in.
AIMET = {
    "iterations": 1500, "grid_lr": 1e-3, "weight_lr": 5e-4, "fp_mix": 0.5, "batch_size": 1, "precision": "float32",
    "start": "minmax", "loss": "squared", "held_out": 0, "optimizer": "adam", "retries": 2,
    "last_block": "output", "label_weight": 0.0, "min_expert_tokens": 128,
}  # fmt: skip
# Decided where model and machine are known.
OPEN = {"micro_batch": None, "memory_gib": None, "compile": "auto", "experts": "auto"}
GIVEN = {
    "iterations": 7, "grid_lr": 0.5, "weight_lr": 0.25, "fp_mix": 0.0, "batch_size": 6, "micro_batch": 3,
    "memory_gib": 1.5, "precision": "bf16", "compile": "off", "start": "search", "loss": "token", "held_out": 2,
    "optimizer": "rms", "retries": 1, "last_block": "predictions", "label_weight": 0.3,
    "experts": "parts", "min_expert_tokens": 5,
}  # fmt: skip


def values(options: OptimizeOptions) -> dict:
    """All options but the preset's name."""
    return {name: value for name, value in dataclasses.asdict(options).items() if name != "preset"}


def test_preset_fills_in_everything_that_is_missing():
    assert values(resolved(OptimizeOptions(preset="aimet"), bits=4, world_size=1, has_bf16=False)) == AIMET | OPEN


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_leaves_open_only_what_the_machine_decides(preset: str):
    filled = values(resolved(OptimizeOptions(preset=preset), bits=4, world_size=2, has_bf16=False))
    assert {name for name, value in filled.items() if value is None} == {"micro_batch", "memory_gib"}


def test_presets_are_those_that_can_be_asked_for():
    assert get_args(get_type_hints(OptimizeOptions)["preset"]) == tuple(PRESETS)


@pytest.mark.parametrize("preset", PRESETS)
def test_weight_rate_rises_as_the_grid_gets_coarser_except_as_aimet_trains(preset: str):
    rates = [resolved(OptimizeOptions(preset=preset), bits, 1, has_bf16=False).weight_lr for bits in (8, 4, 3, 2)]
    if preset == "aimet":
        assert rates == [5e-4] * 4
    else:
        assert rates[0] == rates[1] == min(PRESETS[preset]["weight_lr"]) < rates[2] < rates[3]


def test_a_given_weight_rate_holds_at_any_bits():
    assert resolved(OptimizeOptions(weight_lr=1e-3), 2, 1, has_bf16=False).weight_lr == 1e-3


@pytest.mark.parametrize(("preset", "times"), [("light", 0.5), ("best", 4)])
def test_budgets_differ_from_the_default_in_iterations_and_the_rate_they_need(preset: str, times: float):
    default, budget = PRESETS["default"], PRESETS[preset]
    assert {name for name, value in default.items() if budget[name] != value} == {"iterations", "weight_lr"}
    assert budget["iterations"] == times * default["iterations"]
    assert (budget["weight_lr"] < default["weight_lr"]) == (times > 1), "more steps take a lower rate"


@pytest.mark.parametrize("name", GIVEN)
def test_given_value_is_kept_and_the_rest_filled_in(name: str):
    options = resolved(OptimizeOptions(preset="aimet", **{name: GIVEN[name]}), bits=4, world_size=1, has_bf16=False)
    assert values(options) == AIMET | OPEN | {name: GIVEN[name]}


def test_nothing_is_changed_where_everything_is_given():
    assert values(resolved(OptimizeOptions(**GIVEN), bits=4, world_size=2, has_bf16=False)) == GIVEN


def test_batch_holds_one_sample_a_rank():
    assert resolved(OptimizeOptions(), bits=4, world_size=8, has_bf16=False).batch_size == 8


@pytest.mark.parametrize(
    ("precision", "has_bf16", "dtype"),
    [
        ("auto", True, torch.bfloat16),
        ("auto", False, torch.float32),
        ("bf16", False, torch.bfloat16),
        ("float32", True, torch.float32),
    ],
)
def test_dtype_is_the_devices_unless_it_is_given(precision: str, has_bf16: bool, dtype: torch.dtype):
    assert resolved(OptimizeOptions(precision=precision), bits=4, world_size=1, has_bf16=has_bf16).dtype == dtype


def test_resolving_again_changes_nothing():
    once = resolved(OptimizeOptions(iterations=3), bits=4, world_size=4, has_bf16=True)
    assert resolved(once, bits=4, world_size=2, has_bf16=False) == once


def test_given_options_stay_as_they_were():
    options = OptimizeOptions()
    resolved(options, bits=4, world_size=2, has_bf16=True)
    assert options == OptimizeOptions()
