"""Ranges of activations against numpy on all values, brute force, and AIMET's encoding analyzers."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from shardq.quant.activation import ActivationGrid, ActivationLevels
from shardq.quant.observers import Statistics, no_statistics, observed_grid, statistics_of
from shardq.quant.options import ActivationOptions

GOLDEN = Path(__file__).parents[1] / "golden"
RANGES = json.loads((GOLDEN / "activations.json").read_text())["ranges"]
VALUES = load_file(GOLDEN / "activations.safetensors")
KINDS = [True, False]


def collected(values: torch.Tensor, parts: list[list[int]], with_counts: bool = True) -> Statistics:
    """Statistics of samples that come in these parts."""
    found = no_statistics(values.device, with_counts)
    for part in parts:
        found.merge(statistics_of(values[part], with_counts))
    return found


def grid_of(values: torch.Tensor, levels: ActivationLevels, observer: str, percentile: float = 99.9) -> ActivationGrid:
    return observed_grid(
        statistics_of(values, True), levels, ActivationOptions(observer=observer, percentile=percentile)
    )


def ends(grid: ActivationGrid) -> tuple[float, float]:
    return tuple(grid.scale * (code - grid.zero_point) for code in (grid.levels.qmin, grid.levels.qmax))


def noise(values: torch.Tensor, scale: float, offset: int, num_steps: int) -> float:
    """What the signal-to-noise search minimises, over the values themselves."""
    code = np.round(values.double().numpy() / scale)
    error = (np.clip(code, offset, offset + num_steps) * scale - values.double().numpy()) ** 2
    return float((error * np.where((code < offset) | (code > offset + num_steps), 3.0, 1.0)).mean())


def noise_between(values: torch.Tensor, low: float, high: float, levels: ActivationLevels) -> float:
    scale = (high - low) / levels.num_steps
    return noise(values, scale, round(low / scale), levels.num_steps)


@pytest.mark.parametrize("case", RANGES)
def test_ranges_are_aimets(case: str):
    name, bits, kind, analyzer = case.split()
    levels, low_high = ActivationLevels(bits=int(bits), symmetric=kind == "symmetric"), RANGES[case]
    found = ends(grid_of(VALUES[name], levels, {"tf_enhanced": "sqnr"}.get(analyzer, analyzer)))
    ratio = noise_between(VALUES[name], *found, levels) / noise_between(VALUES[name], *low_high, levels)
    width = low_high[1] - low_high[0]
    half_step = 0.51 * width / levels.num_steps  # AIMET's ends are not on the grid yet
    if analyzer == "minmax":
        assert np.allclose(found, low_high, rtol=0, atol=half_step)
    elif analyzer == "percentile":
        # Between two values that are far apart, AIMET takes the lower edge of the last bin.
        assert np.allclose(found, low_high, rtol=0, atol=half_step + 0.02 * width)
    else:
        assert ratio < 1.003  # its search, on a histogram that is coarser or finer


@pytest.mark.parametrize("symmetric", KINDS)
def test_minmax_and_average_are_numpys(symmetric: bool):
    values, levels = VALUES["skewed"], ActivationLevels(bits=8, symmetric=symmetric)
    per_sample = values.numpy().reshape(len(values), -1)
    expected = {
        "minmax": (per_sample.min(), per_sample.max()),
        "average": (per_sample.min(1).mean(), per_sample.max(1).mean()),
    }
    for observer, (low, high) in expected.items():
        grid = grid_of(values, levels, observer)
        scale = max(high / 127, -low / 128) if symmetric else (high - low) / 255
        assert grid.scale == pytest.approx(scale, rel=1e-6)
        assert grid.zero_point == (0 if symmetric else round(-128 - low / scale))


@pytest.mark.parametrize("percentile", [75, 99, 99.9])
@pytest.mark.parametrize("name", VALUES)
def test_percentile_is_numpys_within_a_bin(name: str, percentile: float):
    values = torch.randn(5, 4000) if name == "outlier" else VALUES[name]
    levels = ActivationLevels(bits=16, symmetric=False)
    rank = 100 / values.numel()
    for place, found in zip(
        (100 - percentile, percentile), ends(grid_of(values, levels, "percentile", percentile)), strict=True
    ):
        before, exact, after = np.percentile(values.numpy(), [place - rank, place, place + rank])
        if place < 50:  # a grid holds 0
            before, after = min(before, 0), min(after, 0)
        slack = abs(exact) / 128 + 1e-3
        assert before - slack <= found <= after + slack


@pytest.mark.parametrize("symmetric", KINDS)
@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("name", VALUES)
def test_search_finds_the_candidate_of_least_noise(name: str, bits: int, symmetric: bool):
    values, levels = VALUES[name], ActivationLevels(bits=bits, symmetric=symmetric)
    n, low, high = levels.num_steps, min(values.min().item(), 0), values.max().item()
    candidates = []
    if symmetric:
        candidates = [(2 * max(high, -low) / n * i / 100, -(2 ** (bits - 1))) for i in range(1, 102)]
    else:
        step = (high - low) / n
        observed, ticks = round(low / step), min(n + 2, 21) - 2
        for i in range(1, 18):
            for offset in [*(round(-n + n * k / ticks) for k in range(ticks + 1)), observed]:
                bottom = max(step * i / 16 * offset, step * observed)
                top = min(step * i / 16 * (offset + n), step * (observed + n))
                scale = max((top - bottom) / n, 2**-23)
                candidates.append((scale, round(bottom / scale)))
    least = min(noise(values, scale, offset, n) for scale, offset in candidates)
    grid = grid_of(values, levels, "sqnr")
    assert noise(values, grid.scale, levels.qmin - grid.zero_point, n) <= least * 1.003


@pytest.mark.parametrize("observer", ["minmax", "average", "percentile", "sqnr"])
def test_order_and_parts_of_the_samples_do_not_matter(observer: str):
    values, levels = VALUES["skewed"], ActivationLevels(bits=8, symmetric=False)
    parts = [[[0, 1, 2, 3, 4, 5]], [[5], [1], [0], [4], [3], [2]], [[4, 2], [0, 5, 1, 3]]]
    statistics = [collected(values, part) for part in parts]
    assert all(torch.equal(found.counts, statistics[0].counts) for found in statistics)
    options = ActivationOptions(observer=observer)
    first, *others = (observed_grid(found, levels, options) for found in statistics)
    assert all(other.scale == pytest.approx(first.scale, rel=1e-6) for other in others)
    assert all(other.zero_point == first.zero_point for other in others)


def test_every_value_is_counted_in_the_bin_of_its_bfloat16_number():
    values = torch.tensor([[0.0, -0.0, 1.0, 1.0039, -1.0, 3.4e38, -1e-42, 1e-3]])
    counts = statistics_of(values, True).counts
    patterns = [int.from_bytes(np.float32(value).tobytes(), "little") >> 16 for value in values[0].tolist()]
    assert counts.sum() == values.numel() and all(counts[pattern] == patterns.count(pattern) for pattern in patterns)
    assert statistics_of(values, False).counts.numel() == 0


def test_half_precision_values_are_taken_as_they_are():
    values = torch.randn(3, 50).bfloat16()
    assert statistics_of(values, True).max == values.max().float()


@pytest.mark.parametrize("observer", ["minmax", "average", "percentile", "sqnr"])
@pytest.mark.parametrize("fault", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_have_no_grid(fault: float, observer: str):
    values = torch.randn(3, 20)
    values[1, 4] = fault
    assert grid_of(values, ActivationLevels(bits=8), observer) is None


def test_no_values_have_no_grid():
    nothing = no_statistics(torch.device("cpu"), True)
    assert observed_grid(nothing, ActivationLevels(bits=8), ActivationOptions()) is None
    nothing.merge(statistics_of(torch.ones(1, 4), True))
    assert observed_grid(nothing, ActivationLevels(bits=8), ActivationOptions()) is not None


@pytest.mark.parametrize("observer", ["minmax", "average", "percentile", "sqnr"])
def test_scales_are_rounded_to_the_dtype_that_is_kept(observer: str):
    grid = grid_of(VALUES["skewed"], ActivationLevels(bits=8, symmetric=False, scale_dtype="bfloat16"), observer)
    assert grid.scale == torch.tensor(grid.scale).bfloat16().item()
    assert grid.zero_point in range(-128, 128)


@pytest.mark.parametrize("observer", ["percentile", "sqnr"])
@pytest.mark.parametrize("value", [0.0, 2.5, -1.0])
def test_constant_activations_have_a_range(observer: str, value: float):
    grid = grid_of(torch.full((2, 8), value), ActivationLevels(bits=8, symmetric=False), observer)
    assert grid.is_valid and min(ends(grid)) <= value + 1e-2 and max(ends(grid)) >= value - 1e-2
