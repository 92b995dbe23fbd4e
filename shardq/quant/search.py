"""A start grid better than min-max: the ends of each row drawn in as far as its rounding error asks for.

Source: the idea of `opt_rtn` in AutoRound and of AIMET's SeqMSE, on AdaScale's own grid; the weighting by the input
channels' mean square is the diagonal of GPTQ's Hessian (arXiv 2210.17323).
"""

import torch
from torch import Tensor

from shardq.devices import values_at_once
from shardq.quant import adascale
from shardq.quant.grid import Grid

BOTH, LOW, HIGH = (1, 1), (1, 0), (0, 1)
# Which ends are moved, by which step of their factors, and the multiples of it that are tried: each time around the
# best so far, first far, then near.
SYMMETRIC = ((BOTH, 0.05, range(-15, 0)), (BOTH, 0.01, range(-4, 5)))
ASYMMETRIC = (
    (BOTH, 0.05, range(-15, 0)), (LOW, 0.05, range(-15, 16)), (HIGH, 0.05, range(-15, 16)), (LOW, 0.01, range(-4, 5)),
    (HIGH, 0.01, range(-4, 5)),
)  # fmt: skip


def searched_range(
    rows_Rg: Tensor, importance_Gg: Tensor, min_R1: Tensor, max_R1: Tensor, grid: Grid
) -> tuple[Tensor, Tensor]:
    """Ends of each row's grid, between which the weighted squared rounding error is least among the factors tried.

    One factor on both ends; with zero points then one on each, so that scale and zero point are both searched.

    Args:
        importance_Gg: weight of the error in each of an output channel's G * g input channels, such as their mean
            square; all zero counts as all equal.
        min_R1, max_R1: ends of the min-max grid (`Grid.start_range`).
    """
    grid = grid.row_by_row  # where scales are kept together, each row's is then the nearest that can be kept
    num_groups, group = importance_Gg.shape
    importance_Gg = torch.where(importance_Gg.any(), importance_Gg, 1.0)
    outputs = max(1, values_at_once(rows_Rg.device) // (num_groups * group))
    ends = [
        _searched_chunk(rows_Rg[start : start + outputs * num_groups].float(), importance_Gg, low_R1, high_R1, grid)
        for start, low_R1, high_R1 in zip(
            range(0, max(1, len(rows_Rg)), outputs * num_groups),
            min_R1.split(outputs * num_groups),
            max_R1.split(outputs * num_groups),
            strict=True,
        )
    ]
    return torch.cat([low for low, _ in ends]), torch.cat([high for _, high in ends])


def _searched_chunk(
    rows_Rg: Tensor, importance_Gg: Tensor, min_R1: Tensor, max_R1: Tensor, grid: Grid
) -> tuple[Tensor, Tensor]:
    def error(low_R1: Tensor, high_R1: Tensor) -> Tensor:
        return _weighted_error(rows_Rg, importance_Gg, low_R1 * min_R1, high_R1 * max_R1, grid)

    low_R1, high_R1 = torch.ones_like(min_R1), torch.ones_like(max_R1)
    least_R1 = error(low_R1, high_R1)
    for (on_low, on_high), step, multiples in ASYMMETRIC if grid.has_zero_point else SYMMETRIC:
        from_low_R1, from_high_R1 = low_R1, high_R1
        for multiple in multiples:
            # The ways in and out add up to more than the whole range.
            tried_low_R1 = (from_low_R1 + on_low * step * multiple).clamp(0.01, 1.05)
            tried_high_R1 = (from_high_R1 + on_high * step * multiple).clamp(0.01, 1.05)
            error_R1 = error(tried_low_R1, tried_high_R1)
            better_R1 = error_R1 < least_R1
            least_R1 = torch.where(better_R1, error_R1, least_R1)
            low_R1 = torch.where(better_R1, tried_low_R1, low_R1)
            high_R1 = torch.where(better_R1, tried_high_R1, high_R1)
    return low_R1 * min_R1, high_R1 * max_R1


def _weighted_error(rows_Rg: Tensor, importance_Gg: Tensor, min_R1: Tensor, max_R1: Tensor, grid: Grid) -> Tensor:
    scale_R1 = grid.scale_of(min_R1, max_R1)
    zero_point_R1 = grid.zero_point_of(min_R1, scale_R1)
    rounded_Rg = adascale.fake_quantized(rows_Rg, None, None, scale_R1, zero_point_R1, grid, torch.float32)
    error_Rg = rounded_Rg.sub_(rows_Rg).square_()
    weighted_OGg = error_Rg.view(-1, *importance_Gg.shape).mul_(importance_Gg)
    return weighted_OGg.sum(2).view(-1, 1)
