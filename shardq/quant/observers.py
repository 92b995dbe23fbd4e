"""Statistics of activations on calibration samples, and the static grids made from them.

Statistics are collected sample by sample, on any rank and in any order; what each of them is reduced by is declared
here. The histogram has no range to be chosen beforehand, or to grow with what comes: its bins are the bfloat16 numbers
(sign, exponent and seven bits of the mantissa), so each is at most 1/128 as wide as the values in it.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

from shardq.quant.activation import ActivationGrid, ActivationLevels, grid_between
from shardq.quant.grid import SCALE_FLOOR
from shardq.quant.options import ActivationOptions

Reduction = Literal["min", "max", "sum"]
NUM_BINS = 1 << 16
WITH_COUNTS = ("percentile", "sqnr")
CLIPPING_WEIGHT = 3.0  # AIMET's tf-enhanced calls it gamma
NARROW = 1e-3  # width of a bin, in steps
CANDIDATES_AT_ONCE = 16


@dataclass
class Statistics:
    """Statistics of one tensor's values.

    Attributes:
        min, max: extremes of all values, float32.
        extremes: float64 [3], the sum of the samples' own minima, that of their maxima, and the number of samples.
            Their mean stands in for a moving average, whose result depends on the order in which samples come, and
            thus on the ranks.
        counts: int64 [65536], values in each bin of the histogram; empty where no observer asks for it.
    """

    min: Tensor
    max: Tensor
    extremes: Tensor
    counts: Tensor

    def merge(self, other: "Statistics") -> None:
        """Add the statistics of other values."""
        for name, reduction in REDUCTIONS.items():
            setattr(self, name, MERGED[reduction](getattr(self, name), getattr(other, name)))


REDUCTIONS: dict[str, Reduction] = {"min": "min", "max": "max", "extremes": "sum", "counts": "sum"}
MERGED: dict[Reduction, Callable[[Tensor, Tensor], Tensor]] = {
    "min": torch.minimum,
    "max": torch.maximum,
    "sum": torch.add,
}


def no_statistics(device: torch.device, with_counts: bool) -> Statistics:
    """Statistics of no values at all."""
    return Statistics(
        torch.tensor(torch.inf, device=device),
        torch.tensor(-torch.inf, device=device),
        torch.zeros(3, dtype=torch.float64, device=device),
        torch.zeros(NUM_BINS if with_counts else 0, dtype=torch.int64, device=device),
    )


@torch.no_grad()
def statistics_of(values: Tensor, with_counts: bool) -> Statistics:
    """Statistics of some samples' values [N, ...], of any float dtype."""
    rows_NE = values.float().flatten(1)
    low_N, high_N = rows_NE.aminmax(dim=1)
    num_samples = torch.full_like(low_N, 1.0)
    extremes = torch.stack([low_N, high_N, num_samples]).sum(1, dtype=torch.float64)
    counts = torch.zeros(0, dtype=torch.int64, device=values.device)
    if with_counts:
        patterns = (rows_NE.contiguous().view(torch.int32) >> 16).bitwise_and_(NUM_BINS - 1)
        counts = torch.bincount(patterns.flatten(), minlength=NUM_BINS)
    return Statistics(low_N.amin(), high_N.amax(), extremes, counts)


def observed_grid(
    statistics: Statistics, levels: ActivationLevels, options: ActivationOptions
) -> ActivationGrid | None:
    """The static grid of the options' observer; None if the values are not finite, or there were none."""
    found = Statistics(**{field.name: getattr(statistics, field.name).cpu() for field in fields(statistics)})
    if not (torch.isfinite(found.extremes).all() and found.extremes[2] > 0):
        return None
    match options.observer:
        case "minmax":
            return grid_between(found.min, found.max, levels)
        case "average":
            return grid_between(found.extremes[0] / found.extremes[2], found.extremes[1] / found.extremes[2], levels)
        case "percentile":
            return grid_between(*_percentiles(found, options.percentile), levels)
        case "sqnr":
            return grid_between(*_least_noise(found, levels), levels)


def _percentiles(statistics: Statistics, percentile: float) -> tuple[Tensor, Tensor]:
    """Values below which `100 - percentile` and `percentile` hundredths of all lie; within a bin, evenly spread."""
    lower, upper, counts = _bins(statistics)
    ranks = counts.sum() * torch.tensor([100 - percentile, percentile], dtype=torch.float64) / 100
    up_to = counts.cumsum(0)
    which = torch.searchsorted(up_to, ranks).clamp_(max=len(counts) - 1)
    share = 1 - ((up_to[which] - ranks) / counts[which]).clamp_(0, 1)
    low, high = lower[which] + share * (upper[which] - lower[which])
    return low, high


def _bins(statistics: Statistics) -> tuple[Tensor, Tensor, Tensor]:
    """Ends and count, float64, of the bins that hold anything, in rising order; no end is beyond the extremes."""
    patterns = statistics.counts.nonzero().flatten()
    counts = statistics.counts[patterns].double()
    # A pattern's bin reaches from its own number to that of the next pattern, away from 0.
    near, far = ((bits.int() << 16).view(torch.float32).double() for bits in (patterns, patterns + 1))
    lower, upper = torch.minimum(near, far), torch.maximum(near, far)
    order, low, high = lower.argsort(), statistics.min.double(), statistics.max.double()
    return lower[order].clamp(low, high), upper[order].clamp(low, high), counts[order]


def _least_noise(statistics: Statistics, levels: ActivationLevels) -> tuple[Tensor, Tensor]:
    """Ends of the candidate grid with the least expected squared error, errors of clipped values counting threefold."""
    low, high = statistics.min.double().clamp(max=0), statistics.max.double().clamp(min=0)
    high = torch.maximum(high, low + SCALE_FLOOR * levels.num_steps)
    steps, offsets = (_symmetric if levels.symmetric else _asymmetric)(low, high, levels)
    bins = _bins(statistics)
    pairs = zip(steps.split(CANDIDATES_AT_ONCE), offsets.split(CANDIDATES_AT_ONCE), strict=True)
    noise = torch.cat([_noise(*bins, *candidates, levels.num_steps) for candidates in pairs])
    best = noise.argmin()
    return steps[best] * offsets[best], steps[best] * (offsets[best] + levels.num_steps)


def _symmetric(low: Tensor, high: Tensor, levels: ActivationLevels) -> tuple[Tensor, Tensor]:
    """Candidates as AIMET's tf-enhanced tries them: 101 steps, hundredths of the one that holds all values."""
    largest = 2 * torch.maximum(high, -low) / levels.num_steps
    steps = (largest * torch.arange(1, 102, dtype=torch.float64) / 100).clamp(min=SCALE_FLOOR)
    return steps, torch.full_like(steps, levels.qmin)


def _asymmetric(low: Tensor, high: Tensor, levels: ActivationLevels) -> tuple[Tensor, Tensor]:
    """Candidates as AIMET's tf-enhanced tries them: 17 steps, with 20 offsets and the observed one each.

    Grids that reach beyond the observed range are cut off there.
    """
    num_steps = levels.num_steps
    largest = (high - low) / num_steps
    observed = (low / largest).round()
    steps = largest * torch.arange(1, 18, dtype=torch.float64) / 16
    num_offsets = min(num_steps + 2, 21) - 2
    offsets = (num_steps * torch.arange(-num_offsets, 1, dtype=torch.float64) / num_offsets).round()
    offsets = torch.cat([offsets, observed[None]])
    ends = steps[:, None] * offsets, steps[:, None] * (offsets + num_steps)
    lower, upper = ends[0].clamp(min=largest * observed), ends[1].clamp(max=largest * (observed + num_steps))
    steps = ((upper - lower) / num_steps).clamp(min=SCALE_FLOOR)
    return steps.flatten(), (lower / steps).round().flatten()


def _noise(lower: Tensor, upper: Tensor, counts: Tensor, steps: Tensor, offsets: Tensor, num_steps: int) -> Tensor:
    """Expected squared error of each candidate grid [K], if the values of a bin are spread evenly over it.

    Where a bin is narrow beside the step, its middle stands for all of it: the difference of two nearly equal integrals
    would be lost in rounding.
    """
    steps, offsets = steps[:, None], offsets[:, None]
    width = upper - lower
    integral = _error_integral(upper, steps, offsets, num_steps) - _error_integral(lower, steps, offsets, num_steps)
    middle = (lower + upper) / 2
    code = (middle / steps).round()
    error = (code.clamp(offsets, offsets + num_steps) * steps - middle).square()
    is_clipped = (code < offsets) | (code > offsets + num_steps)
    at_middle = torch.where(is_clipped, CLIPPING_WEIGHT * error, error)
    return torch.where(width < NARROW * steps, at_middle, integral / width) @ counts


def _error_integral(ends: Tensor, steps: Tensor, offsets: Tensor, num_steps: int) -> Tensor:
    """Integral, from a common start to each end, of the squared error of a grid of the steps `offset ... offset + n`.

    Up to half a step beyond the grid's ends the error is that of rounding, whose integral over a whole step is 1/12 of
    the step's cube; further out it is the distance to the end.
    """
    in_steps = ends / steps
    inside = in_steps.clamp(offsets - 0.5, offsets + num_steps + 0.5)
    nearest = inside.round()
    rounding = nearest / 12 + (inside - nearest) ** 3 / 3
    above = (in_steps - (offsets + num_steps)).clamp(min=0.5) ** 3 - 0.125
    below = (in_steps - offsets).clamp(max=-0.5) ** 3 + 0.125
    return steps**3 * (rounding + CLIPPING_WEIGHT * (above + below) / 3)
