"""AdaScale: FlexRound's learned division of the weight and OmniQuant's learned clipping of the grid.

    U  = W / exp(s2) / exp(s3)                    s2 [R, g], s3 [R, 1]
    s  = (exp(gamma) * max - exp(beta) * min) / (2^b - 1)
    W^ = s * (clamp(round(U / s) + z, qmin, qmax) - z)

Sources: FlexRound, arXiv 2306.00317, equation 2; OmniQuant, arXiv 2308.13137, equation 2 (learnable weight
clipping); the combination and its logarithmic parameters are AIMET's AdaScale. The zero point z is ours: AIMET's
is symmetric only. Shapes as in `shardq.quant.affine`.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from shardq.quant import affine
from shardq.quant.spec import QuantSpec

CACHED_ELEMENTS = 1 << 18  # 1 MiB of float32: of 2^15 to 2^18 the fastest on CPUs with 1 MiB of cache a core


def learned_grid(
    min_R1: Tensor, max_R1: Tensor, beta_R1: Tensor, gamma_R1: Tensor, spec: QuantSpec
) -> tuple[Tensor, Tensor]:
    """Scale and zero point after learned clipping; differentiable in beta and gamma.

    Args:
        min_R1, max_R1: frozen ends of the start grid.
        beta_R1, gamma_R1: logarithms of the factors on min and max; 0 leaves an end where it is.
    """
    low_R1, high_R1 = beta_R1.exp() * min_R1, gamma_R1.exp() * max_R1
    scale_R1 = affine.scale_of(low_R1, high_R1, spec)
    return scale_R1, affine.zero_point_of(low_R1, scale_R1, spec)


def divided_weight(rows_Rg: Tensor, s2_Rg: Tensor | None, s3_R1: Tensor | None) -> Tensor:
    """The weight that is rounded, `W / exp(s2) / exp(s3)`; the weight itself where both are None."""
    if s2_Rg is None:
        return rows_Rg
    # Two divisions, not one by the product: the float32 result is then AIMET's to the bit.
    return (rows_Rg / s2_Rg.exp()).div_(s3_R1.exp())


class FakeQuantize(torch.autograd.Function):
    """`W^` of the module docstring with straight-through rounding, in float32.

    Saves only its inputs for backward and recomputes the rest: a plain autograd graph keeps three more tensors of
    the weight's size. Gradients reach s2, s3, scale and zero point; the weight is frozen. On a CPU both directions
    work on a few rows at a time, whose temporaries stay in the cache.
    """

    @staticmethod
    def forward(ctx, rows_Rg, s2_Rg, s3_R1, scale_R1, zero_point_R1, spec):
        """Return the fake-quantized rows [R, g]."""
        ctx.save_for_backward(rows_Rg, s2_Rg, s3_R1, scale_R1, zero_point_R1)
        ctx.spec = spec
        output_Rg = torch.empty_like(rows_Rg)
        for some in _row_slices(rows_Rg):
            scale_r1, zero_point_r1 = scale_R1[some], zero_point_R1[some]
            codes_rg = torch.div(_divided(rows_Rg, s2_Rg, s3_R1, some), scale_r1, out=output_Rg[some])
            codes_rg.round_().clamp_(spec.qmin - zero_point_r1, spec.qmax - zero_point_r1).mul_(scale_r1)
        return output_Rg

    @staticmethod
    def backward(ctx, grad_Rg):
        """Gradients by the formulas of the straight-through estimator.

        Inside the grid the rounded value passes dW^ on to U and (round - U/s) on to s; outside it U gets
        nothing and s gets the distance of the grid's end from the zero point.
        """
        rows_Rg, s2_Rg, s3_R1, scale_R1, zero_point_R1 = ctx.saved_tensors
        spec = ctx.spec
        grad_s2_Rg = None if s2_Rg is None else torch.empty_like(s2_Rg)
        grad_s3_R1 = None if s3_R1 is None else torch.empty_like(s3_R1)
        grad_scale_R1, grad_zero_point_R1 = torch.empty_like(scale_R1), torch.empty_like(scale_R1)
        for some in _row_slices(rows_Rg):
            grad_rg, scale_r1, zero_point_r1 = grad_Rg[some], scale_R1[some], zero_point_R1[some]
            divided_rg = _divided(rows_Rg, s2_Rg, s3_R1, some)
            steps_rg = divided_rg / scale_r1
            rounded_rg = steps_rg.round()
            clamped_rg = rounded_rg.clamp(spec.qmin - zero_point_r1, spec.qmax - zero_point_r1)
            passed_rg = grad_rg * (clamped_rg == rounded_rg)
            grad_zero_point_R1[some] = (passed_rg - grad_rg).sum(1, keepdim=True) * scale_r1
            # clamped - U/s inside and clamped outside, written without a branch.
            grad_scale_R1[some] = clamped_rg.mul_(grad_rg).sub_(steps_rg.mul_(passed_rg)).sum(1, keepdim=True)
            if s2_Rg is not None:
                torch.mul(divided_rg, passed_rg, out=grad_s2_Rg[some]).neg_()
                grad_s3_R1[some] = grad_s2_Rg[some].sum(1, keepdim=True)
        return None, grad_s2_Rg, grad_s3_R1, grad_scale_R1, grad_zero_point_R1, None


def _divided(rows_Rg: Tensor, s2_Rg: Tensor | None, s3_R1: Tensor | None, some: slice) -> Tensor:
    if s2_Rg is None:
        return rows_Rg[some]
    return divided_weight(rows_Rg[some], s2_Rg[some], s3_R1[some])


def _row_slices(rows_Rg: Tensor) -> Iterator[slice]:
    """Slices over rows: whole on a GPU, of about CACHED_ELEMENTS on a CPU."""
    num_rows = len(rows_Rg)
    step = num_rows if rows_Rg.is_cuda else max(1, CACHED_ELEMENTS // rows_Rg.shape[1])
    return (slice(first, first + step) for first in range(0, num_rows, step))


def fold(
    rows_Rg: Tensor,
    s2_Rg: Tensor | None,
    s3_R1: Tensor | None,
    scale_R1: Tensor,
    zero_point_R1: Tensor,
    spec: QuantSpec,
) -> Tensor:
    """Codes (int8) of the divided weight: what the trained quantizer becomes."""
    return affine.quantize(divided_weight(rows_Rg, s2_Rg, s3_R1), scale_R1, zero_point_R1, spec)
