"""The searched start grid against every grid of the candidates tried one by one in float64."""

import numpy as np
import pytest
import torch

from shardq.quant.integer_grid import IntegerGrid
from shardq.quant.search import searched_range

GRIDS = [
    IntegerGrid(bits=bits, symmetric=symmetric, group_size=group_size)
    for bits, symmetric, group_size in ((2, True, None), (3, True, 8), (4, True, None), (3, False, 8), (4, False, None))
]


def weight_and_importance() -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [12, 32] with an outlier in each row, and its input channels' importance [32]."""
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(12, 32, generator=generator)
    weight[:, 3] *= 4
    return weight, torch.rand(32, generator=generator) ** 4


def error(weight: np.ndarray, importance: np.ndarray, low: float, high: float, grid: IntegerGrid) -> float:
    """Weighted squared rounding error of one row on the grid between two ends."""
    scale = (high - low) / (2**grid.bits - 1)
    zero = 0 if grid.symmetric else np.clip(np.round(grid.qmin - low / scale), grid.qmin, grid.qmax)
    codes = np.clip(np.round(weight / scale) + zero, grid.qmin, grid.qmax)
    return float((importance * ((codes - zero) * scale - weight) ** 2).sum())


def errors_of_rows(weight, importance, low, high, grid) -> np.ndarray:
    """The same for all rows of a weight."""
    rows = grid.rows(weight).double().numpy()
    channels = importance.double().numpy().reshape(-1, rows.shape[1])
    return np.array([
        error(row, channels[number % len(channels)], low[number].item(), high[number].item(), grid)
        for number, row in enumerate(rows)
    ])  # fmt: skip


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_search_comes_close_to_the_best_of_a_fine_scan(grid: IntegerGrid):
    weight, importance = weight_and_importance()
    rows = grid.rows(weight)
    start = grid.start_range(rows)
    found = errors_of_rows(
        weight, importance, *searched_range(rows, importance.view(-1, rows.shape[1]), *start, grid), grid
    )
    before = errors_of_rows(weight, importance, *start, grid)
    scan = np.min(
        [errors_of_rows(weight, importance, factor * start[0], factor * start[1], grid)
         for factor in np.arange(0.2, 1.05, 0.002)], axis=0,
    )  # fmt: skip
    assert (found <= before * (1 + 1e-6)).all()
    assert found.sum() < 0.9 * before.sum(), "the outliers were meant to be clipped"
    assert found.sum() <= 1.1 * scan.sum()


def test_asymmetric_ends_move_apart_from_one_another():
    grid = IntegerGrid(bits=3, symmetric=False)
    generator = torch.Generator().manual_seed(1)
    weight = torch.rand(4, 64, generator=generator) - 0.2  # between -0.2 and 0.8
    weight[:, 0] = 4  # an outlier above only
    importance = torch.ones(1, 64)
    importance[0, 0] = 1e-3
    start = grid.start_range(weight)
    low, high = searched_range(weight, importance, *start, grid)
    assert (high < 0.25 * start[1]).all() and (low < 0.35 * start[0]).all()
    found = errors_of_rows(weight, importance[0], low, high, grid)
    by_hand = errors_of_rows(weight, importance[0], torch.full((4, 1), -0.2), torch.full((4, 1), 0.8), grid)
    assert (found < by_hand).all()


def test_unimportant_channel_is_clipped_and_important_one_is_not():
    grid = IntegerGrid(bits=3)
    weight = torch.linspace(-1, 1, 32)[None].repeat(2, 1)
    weight[:, 5] = 6
    start = grid.start_range(weight)
    ignoring, heeding = torch.ones(1, 32), torch.ones(1, 32)
    ignoring[0, 5], heeding[0, 5] = 0, 1e4
    assert (searched_range(weight, ignoring, *start, grid)[1] < 0.3 * start[1]).all()
    assert (searched_range(weight, heeding, *start, grid)[1] > 0.9 * start[1]).all()


def test_channels_that_nothing_reached_count_alike():
    weight, _ = weight_and_importance()
    grid = IntegerGrid(bits=3)
    start = grid.start_range(weight)
    unreached = searched_range(weight, torch.zeros(1, 32), *start, grid)
    alike = searched_range(weight, torch.ones(1, 32), *start, grid)
    assert torch.equal(unreached[0], alike[0]) and torch.equal(unreached[1], alike[1])


def test_chunks_do_not_change_what_is_found(monkeypatch):
    weight, importance = weight_and_importance()
    grid = IntegerGrid(bits=4, group_size=8)
    rows = grid.rows(weight)
    start, importance = grid.start_range(rows), importance.view(4, 8)
    whole = searched_range(rows, importance, *start, grid)
    monkeypatch.setattr("shardq.quant.search.values_at_once", lambda device: 64)  # two output channels
    parts = searched_range(rows, importance, *start, grid)
    assert torch.equal(whole[0], parts[0]) and torch.equal(whole[1], parts[1])
