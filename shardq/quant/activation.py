"""Integer grids of activations: one for a whole tensor, known beforehand, or one a token, found as the model runs."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shardq.quant import affine
from shardq.quant.spec import QuantSpec

SMALLEST = torch.finfo(torch.float32).tiny


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
    def spec(self) -> QuantSpec:
        """Codes of the grid."""
        return QuantSpec(bits=self.bits, symmetric=self.symmetric)

    @property
    def is_static(self) -> bool:
        """Whether the grid is known beforehand."""
        return self.scale is not None

    @property
    def is_valid(self) -> bool:
        """Whether a static grid's scale is finite and positive and its zero point one of its codes."""
        if self.scale is None or self.zero_point is None:
            return self.scale is None and self.zero_point is None
        zero_points = (0, 0) if self.symmetric else (self.spec.qmin, self.spec.qmax)
        return 0 < self.scale < math.inf and zero_points[0] <= self.zero_point <= zero_points[1]


def grid_between(low: Tensor, high: Tensor, spec: QuantSpec) -> ActivationGrid:
    """The static grid that reaches from `low` to `high` (scalars), as AIMET's min-max calibration makes it."""
    min_11, max_11 = affine.start_range(torch.stack([low, high]).float().view(1, 2), spec)
    scale_11 = affine.scale_of(min_11, max_11, spec)
    zero_point_11 = affine.zero_point_of(min_11, scale_11, spec)
    return ActivationGrid(spec.bits, spec.symmetric, scale_11.item(), int(zero_point_11.item()))


def rounded(values: Tensor, grid: ActivationGrid) -> Tensor:
    """The nearest grid points, found in float32; same dtype."""
    exact, spec = values.float(), grid.spec
    scale: Tensor | float
    zero_point: Tensor | int
    if grid.scale is None or grid.zero_point is None:
        scale, zero_point = token_grid(exact, spec)
    else:
        scale, zero_point = grid.scale, grid.zero_point
    codes = (exact / scale).round_().add_(zero_point).clamp_(spec.qmin, spec.qmax)
    return codes.sub_(zero_point).mul_(scale).to(values.dtype)


class RoundThrough(torch.autograd.Function):
    """`rounded`, whose gradient passes straight through but for values beyond the grid's ends, which have none."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, scale: Tensor | float, zero_point: Tensor | int, spec: QuantSpec) -> Tensor:
        """Return the nearest grid points, found in float32, in the dtype of `values`."""
        codes = (values.float() / scale).round() + zero_point
        ctx.save_for_backward((codes >= spec.qmin) & (codes <= spec.qmax))
        return ((codes.clamp(spec.qmin, spec.qmax) - zero_point) * scale).to(values.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient of the values."""
        (is_inside,) = ctx.saved_tensors
        return gradient * is_inside, None, None, None


def token_grid(values: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Scale and zero point [..., 1] of each token, whose float32 values lie along the last axis.

    Symmetric grids reach half a step beyond the largest code, as compressed-tensors' do.
    """
    if spec.symmetric:
        scale = values.abs().amax(-1, keepdim=True) / (spec.num_steps / 2)
        scale = scale.clamp(min=SMALLEST)
        return scale, torch.zeros_like(scale)
    low, high = values.amin(-1, keepdim=True).clamp(max=0), values.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / spec.num_steps).clamp(min=SMALLEST)
    return scale, (spec.qmin - low / scale).clamp_(spec.qmin, spec.qmax).round_()
