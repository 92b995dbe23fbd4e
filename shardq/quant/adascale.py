"""AdaScale: FlexRound's learned division of the weight and OmniQuant's learned clipping of the grid.

    U  = W / exp(s2) / exp(s3)                    s2 [R, g], s3 [R, 1]
    s  = (exp(gamma) * max - exp(beta) * min) / steps of the grid
    W^ = s * (the grid's level nearest to U / s)

Sources: FlexRound, arXiv 2306.00317, equation 2; OmniQuant, arXiv 2308.13137, equation 2 (learnable weight
clipping); the combination and its logarithmic parameters are AIMET's AdaScale. What a level is, and how `s` is kept,
is the grid's (`shardq.quant.grid`, for the shapes too); rounding passes gradients straight through.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shardq.quant.grid import Grid, row_chunks


class Trained(NamedTuple):
    """What is trained of one weight, or its gradients; None where a method does not train it.

    `beta_R1` and `gamma_R1` are logarithms of the factors on the start grid's min and max: 0 leaves an end where it is.
    """

    s2_Rg: Tensor | None
    s3_R1: Tensor | None
    beta_R1: Tensor | None
    gamma_R1: Tensor | None


Ends = tuple[Tensor, Tensor]
"""Min and max of the frozen start grid, each [R, 1]."""


def learned_grid(ends: Ends, trained: Trained, grid: Grid, num_groups: int | None = None) -> tuple[Tensor, Tensor]:
    """Scale and zero point after learned clipping.

    Args:
        num_groups: as in `Grid.scale_of`.
    """
    low_R1, high_R1 = _clipped(ends, trained)
    scale_R1 = grid.scale_of(low_R1, high_R1, num_groups)
    return scale_R1, grid.zero_point_of(low_R1, scale_R1)


def learned_grid_gradients(
    grad_scale_R1: Tensor, grad_zero_point_R1: Tensor, scale_R1: Tensor, ends: Ends, trained: Trained, grid: Grid
) -> tuple[Tensor, Tensor]:
    """Gradients of beta and gamma from those of scale and zero point, whose rounding passes them straight through."""
    low_R1, high_R1 = _clipped(ends, trained)
    gradients = grid.range_gradients(grad_scale_R1, grad_zero_point_R1, scale_R1, low_R1, high_R1)
    return gradients[0] * low_R1, gradients[1] * high_R1


def _clipped(ends: Ends, trained: Trained) -> Ends:
    if trained.beta_R1 is None or trained.gamma_R1 is None:
        return ends
    return trained.beta_R1.exp() * ends[0], trained.gamma_R1.exp() * ends[1]


def divided_weight(rows_Rg: Tensor, s2_Rg: Tensor | None, s3_R1: Tensor | None) -> Tensor:
    """The weight that is rounded, `W / exp(s2) / exp(s3)` in float32; the weight itself where both are None."""
    if s2_Rg is None or s3_R1 is None:
        return rows_Rg.float()
    # Two divisions, not one by the product: the float32 result is then AIMET's to the bit on the same processor.
    return rows_Rg.float() / s2_Rg.exp() / s3_R1.exp()


def fake_quantized(
    rows_Rg: Tensor,
    s2_Rg: Tensor | None,
    s3_R1: Tensor | None,
    scale_R1: Tensor,
    zero_point_R1: Tensor,
    grid: Grid,
    dtype: torch.dtype,
) -> Tensor:
    """`W^` of the module docstring [R, g], computed in float32 and rounded to `dtype` at the end."""
    levels_Rg = grid.nearest(divided_weight(rows_Rg, s2_Rg, s3_R1) / scale_R1, zero_point_R1)
    return (levels_Rg * scale_R1).to(dtype)


def fake_quantized_gradients(
    grad_Rg: Tensor,
    rows_Rg: Tensor,
    s2_Rg: Tensor | None,
    s3_R1: Tensor | None,
    scale_R1: Tensor,
    zero_point_R1: Tensor,
    grid: Grid,
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:
    """Gradients of s2, s3, scale and zero point from that of `W^`, float32, with straight-through rounding.

    Inside the grid the level passes dW^ on to U and (level - U/s) on to s; outside it U gets nothing and s gets the
    grid's end.
    """
    grad_Rg = grad_Rg.float()
    # Multiplied, where forward has to divide as AIMET does: 0.87 of the time on a CPU (measured). A quotient half way
    # between two codes may be rounded the other way here, which no gradient tells apart.
    if s2_Rg is None or s3_R1 is None:
        steps_Rg = rows_Rg.float() * scale_R1.reciprocal()
    else:
        steps_Rg = rows_Rg.float() * (-s2_Rg).exp() * (s3_R1.exp() * scale_R1).reciprocal()
    levels_Rg = grid.nearest(steps_Rg, zero_point_R1)
    passed_Rg = torch.where(grid.is_inside(steps_Rg, levels_Rg), grad_Rg, 0.0)
    grad_zero_point_R1 = (passed_Rg - grad_Rg).sum(1, keepdim=True) * scale_R1
    grad_steps_Rg = steps_Rg * passed_Rg
    shared_R1 = grad_steps_Rg.sum(1, keepdim=True)
    # level - U/s inside and level outside, written without a branch.
    grad_scale_R1 = (levels_Rg * grad_Rg).sum(1, keepdim=True) - shared_R1
    if s2_Rg is None:
        return None, None, grad_scale_R1, grad_zero_point_R1
    return grad_steps_Rg * -scale_R1, shared_R1 * -scale_R1, grad_scale_R1, grad_zero_point_R1


def trained_weight(
    rows_Rg: Tensor, ends: Ends, trained: Trained, grid: Grid, num_groups: int, dtype: torch.dtype
) -> Tensor:
    """`W^` of the module docstring on the learned grid; as `learned_grid` and `fake_quantized`."""
    scales = learned_grid(ends, trained, grid, num_groups)
    return fake_quantized(rows_Rg, trained.s2_Rg, trained.s3_R1, *scales, grid, dtype)


def trained_weight_gradients(
    grad_Rg: Tensor, rows_Rg: Tensor, ends: Ends, trained: Trained, grid: Grid, num_groups: int
) -> Trained:
    """Gradients of what is trained, beta and gamma by every method, from that of `trained_weight`."""
    scales = learned_grid(ends, trained, grid, num_groups)
    grad_s2_Rg, grad_s3_R1, grad_scale_R1, grad_zero_point_R1 = fake_quantized_gradients(
        grad_Rg, rows_Rg, trained.s2_Rg, trained.s3_R1, *scales, grid
    )
    grad_ends = learned_grid_gradients(grad_scale_R1, grad_zero_point_R1, scales[0], ends, trained, grid)
    return Trained(grad_s2_Rg, grad_s3_R1, *grad_ends)


class Kernels(NamedTuple):
    """The two functions above as they are called: compiled into one pass over the weight each, or plain."""

    forward: Callable[..., Tensor] = trained_weight
    backward: Callable[..., Trained] = trained_weight_gradients


class FakeQuantize(torch.autograd.Function):
    """`trained_weight` as a function that autograd can differentiate, without a plain graph's temporaries.

    Saves only its inputs for backward, 6 bytes a weight with a 16-bit checkpoint (a plain graph: 13 and more), and
    recomputes the rest. Gradients reach what is trained; the weight and the start grid are frozen.
    """

    @staticmethod
    def forward(
        ctx: Any, kernels: Kernels, grid: Grid, num_groups: int, dtype: torch.dtype, *tensors: Tensor | None
    ) -> Tensor:
        """Return the fake-quantized rows [R, g] in `dtype`; `tensors`: the weight, the start grid's ends, `Trained`."""
        ctx.save_for_backward(*tensors)
        ctx.kernels, ctx.grid, ctx.num_groups = kernels, grid, num_groups
        return kernels.forward(*_arguments(tensors), grid, num_groups, dtype)

    @staticmethod
    def backward(ctx: Any, grad_Rg: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the inputs that have one."""
        gradients = ctx.kernels.backward(grad_Rg, *_arguments(ctx.saved_tensors), ctx.grid, ctx.num_groups)
        num_frozen = len(ctx.needs_input_grad) - len(gradients)
        return *[None] * num_frozen, *gradients


def _arguments(tensors: tuple[Tensor | None, ...]) -> tuple[Tensor, Ends, Trained]:
    """A kernel's, none an nn.Parameter: torch.compile makes code for one size only of a parameter."""
    rows_Rg, min_R1, max_R1, *trained = tensors
    assert rows_Rg is not None and min_R1 is not None and max_R1 is not None
    ends = min_R1.detach(), max_R1.detach()
    return rows_Rg.detach(), ends, Trained(*(tensor if tensor is None else tensor.detach() for tensor in trained))


def fold(
    rows_Rg: Tensor,
    s2_Rg: Tensor | None,
    s3_R1: Tensor | None,
    scale_R1: Tensor,
    zero_point_R1: Tensor,
    grid: Grid,
) -> Tensor:
    """Codes (int8) of the divided weight: what the trained quantizer becomes."""

    def codes(some: slice) -> Tensor:
        s2, s3 = (tensor if tensor is None else tensor[some] for tensor in (s2_Rg, s3_R1))
        return grid.encode(divided_weight(rows_Rg[some], s2, s3), scale_R1[some], zero_point_R1[some])

    return torch.cat([codes(some) for some in row_chunks(rows_Rg)])
