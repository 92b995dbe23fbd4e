"""What formats of integer codes share."""

import torch
from torch import Tensor

from shardq.errors import CheckpointError, ConfigError
from shardq.quant.grid import Grid
from shardq.quant.integer_grid import IntegerGrid


def integer_grid(format_name: str, grid: Grid) -> IntegerGrid:
    """The grid as an integer grid.

    Raises:
        ConfigError: the grid is of another kind.
    """
    if not isinstance(grid, IntegerGrid):
        raise ConfigError(f"{format_name}: only integer grids are supported, not {grid.description}; export hf instead")
    return grid


def grid_points(
    where: str, codes_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor | None, group_I: Tensor | None
) -> Tensor:
    """The weight [O, I] that codes stand for, in the scales' dtype, as programs compute it.

    Args:
        where: file and name, for a message.
        zero_OG: default: 0 everywhere.
        group_I: of each input channel; default: groups of equal size, in order. O may be 1 for all.

    Raises:
        CheckpointError: a channel is of a group that has no scale.
    """
    num_inputs, num_groups = codes_OI.shape[1], scale_OG.shape[1]
    if group_I is None:
        group_I = torch.arange(num_inputs) // (num_inputs // num_groups)
    is_whole = group_I.shape == (num_inputs,)
    if not (is_whole and 0 <= int(group_I.min()) <= int(group_I.max()) < num_groups):
        raise CheckpointError(f"{where}: an input channel is of none of the {num_groups} groups; download it again")
    codes_OI = codes_OI.float()
    if zero_OG is not None:
        codes_OI = codes_OI - zero_OG.float()[:, group_I]
    return (codes_OI * scale_OG.float()[:, group_I]).to(scale_OG.dtype)
