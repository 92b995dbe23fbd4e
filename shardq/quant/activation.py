"""Integer grids of activations: static, one for a tensor, or one for each token, computed while the model runs."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from shardq.quant.integer_grid import IntegerGrid

SMALLEST = torch.finfo(torch.float32).tiny


class ActivationLevels(IntegerGrid):
    """The integer grid of an activation. Its codes are not stored, so they may take more than a byte."""

    most_bits: ClassVar[int] = 16


@dataclass(frozen=True)
class ActivationGrid:
    """The grid of one activation.

    Attributes:
        scale: float32 step; None: each token has a grid of its own, found as the model runs.
        zero_point: the code that stands for 0, 0 on a symmetric grid; None like the scale.
    """

    bits: int
    symmetric: bool
    scale: float | None = None
    zero_point: int | None = None

    @property
    def levels(self) -> ActivationLevels:
        """The grid's levels, in steps from 0."""
        return ActivationLevels(bits=self.bits, symmetric=self.symmetric)

    @property
    def is_static(self) -> bool:
        """Whether the grid is known beforehand."""
        return self.scale is not None

    @property
    def is_valid(self) -> bool:
        """Whether a static grid's scale is finite and positive and its zero point one of its codes."""
        if self.scale is None or self.zero_point is None:
            return self.scale is None and self.zero_point is None
        zero_points = (0, 0) if self.symmetric else (self.levels.qmin, self.levels.qmax)
        return 0 < self.scale < math.inf and zero_points[0] <= self.zero_point <= zero_points[1]


def grid_between(low: Tensor, high: Tensor, levels: ActivationLevels) -> ActivationGrid:
    """The static grid that reaches from `low` to `high` (scalars), as AIMET's min-max calibration makes it."""
    min_11, max_11 = levels.start_range(torch.stack([low, high]).float().view(1, 2))
    scale_11 = levels.scale_of(min_11, max_11)
    zero_point_11 = levels.zero_point_of(min_11, scale_11)
    return ActivationGrid(levels.bits, levels.symmetric, scale_11.item(), int(zero_point_11.item()))


def rounded(values: Tensor, grid: ActivationGrid) -> Tensor:
    """The nearest grid points, found in float32; same dtype."""
    exact, levels = values.float(), grid.levels
    scale: Tensor | float
    zero_point: Tensor | int
    if grid.scale is None or grid.zero_point is None:
        scale, zero_point = token_grid(exact, levels)
    else:
        scale, zero_point = grid.scale, grid.zero_point
    codes = (exact / scale).round_().add_(zero_point).clamp_(levels.qmin, levels.qmax)
    return codes.sub_(zero_point).mul_(scale).to(values.dtype)


class RoundThrough(torch.autograd.Function):
    """`rounded` with straight-through gradients; values beyond the grid's ends have gradient 0."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, scale: Tensor | float, zero_point: Tensor | int, levels: ActivationLevels
    ) -> Tensor:
        """The nearest grid points, computed in float32, in the dtype of `values`."""
        codes = (values.float() / scale).round() + zero_point
        ctx.save_for_backward((codes >= levels.qmin) & (codes <= levels.qmax))
        return ((codes.clamp(levels.qmin, levels.qmax) - zero_point) * scale).to(values.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient in the values."""
        (is_inside,) = ctx.saved_tensors
        return gradient * is_inside, None, None, None


def token_grid(values: Tensor, levels: ActivationLevels) -> tuple[Tensor, Tensor]:
    """Scale and zero point [..., 1] of each token, whose float32 values lie along the last axis.

    Symmetric grids reach half a step beyond the largest code, as compressed-tensors' do.
    """
    if levels.symmetric:
        scale = values.abs().amax(-1, keepdim=True) / (levels.num_steps / 2)
        scale = scale.clamp(min=SMALLEST)
        return scale, torch.zeros_like(scale)
    low, high = values.amin(-1, keepdim=True).clamp(max=0), values.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / levels.num_steps).clamp(min=SMALLEST)
    return scale, (levels.qmin - low / scale).clamp_(levels.qmin, levels.qmax).round_()
