"""Presets: they fill in what was not given and nothing else."""

import dataclasses

import pytest

from shardq.optimize.options import OptimizeOptions, resolved

# AIMET's own defaults for AdaScale, and one sample a rank.
AIMET = {"iterations": 1500, "grid_lr": 1e-3, "weight_lr": 5e-4, "fp_mix": 0.5, "batch_size": 1}
GIVEN = {"iterations": 7, "grid_lr": 0.5, "weight_lr": 0.25, "fp_mix": 0.0, "batch_size": 6}


def values(options: OptimizeOptions) -> dict:
    """All options but the preset's name."""
    return {name: value for name, value in dataclasses.asdict(options).items() if name != "preset"}


def test_preset_fills_in_everything_that_is_missing():
    assert values(resolved(OptimizeOptions(), world_size=1)) == AIMET


@pytest.mark.parametrize("name", GIVEN)
def test_given_value_is_kept_and_the_rest_filled_in(name: str):
    options = resolved(OptimizeOptions(**{name: GIVEN[name]}), world_size=1)
    assert values(options) == AIMET | {name: GIVEN[name]}


def test_nothing_is_changed_where_everything_is_given():
    assert values(resolved(OptimizeOptions(**GIVEN), world_size=2)) == GIVEN


def test_batch_holds_one_sample_a_rank():
    assert resolved(OptimizeOptions(), world_size=8).batch_size == 8


def test_resolving_again_changes_nothing():
    once = resolved(OptimizeOptions(iterations=3), world_size=4)
    assert resolved(once, world_size=2) == once


def test_given_options_stay_as_they_were():
    options = OptimizeOptions()
    resolved(options, world_size=2)
    assert options == OptimizeOptions()
