"""AdaScale: FlexRound's learned division of the weight and OmniQuant's learned clipping of the grid.

    U  = W / exp(s2) / exp(s3)                    s2 [R, g], s3 [R, 1]
    s  = (exp(gamma) * max - exp(beta) * min) / (2^b - 1)
    W^ = s * (clamp(round(U / s) + z, qmin, qmax) - z)

Sources: FlexRound, arXiv 2306.00317, equation 2; OmniQuant, arXiv 2308.13137, equation 2 (learnable weight
clipping); the combination and its logarithmic parameters are AIMET's AdaScale. The zero point z is ours: AIMET's
is symmetric only. Shapes as in `shardq.quant.affine`.
"""

import torch
from torch import Tensor

from shardq.quant import affine
from shardq.quant.spec import QuantSpec


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
    the weight's size. Gradients reach s2, s3, scale and zero point; the weight is frozen.
    """

    @staticmethod
    def forward(ctx, rows_Rg, s2_Rg, s3_R1, scale_R1, zero_point_R1, spec):
        """Return the fake-quantized rows [R, g]."""
        ctx.save_for_backward(rows_Rg, s2_Rg, s3_R1, scale_R1, zero_point_R1)
        ctx.spec = spec
        codes_Rg = divided_weight(rows_Rg, s2_Rg, s3_R1) / scale_R1
        codes_Rg.round_()
        if spec.symmetric:
            return codes_Rg.clamp_(spec.qmin, spec.qmax).mul_(scale_R1)
        codes_Rg.add_(zero_point_R1).clamp_(spec.qmin, spec.qmax)
        return codes_Rg.sub_(zero_point_R1).mul_(scale_R1)

    @staticmethod
    def backward(ctx, grad_Rg):
        """Gradients by the formulas of the straight-through estimator.

        Inside the grid the rounded value passes dW^ on to U and (round - U/s) on to s; outside it U gets
        nothing and s gets the distance of the grid's end from the zero point.
        """
        rows_Rg, s2_Rg, s3_R1, scale_R1, zero_point_R1 = ctx.saved_tensors
        spec = ctx.spec
        divided_Rg = divided_weight(rows_Rg, s2_Rg, s3_R1)
        steps_Rg = divided_Rg / scale_R1
        rounded_Rg = steps_Rg.round()
        clamped_Rg = rounded_Rg.clamp(spec.qmin - zero_point_R1, spec.qmax - zero_point_R1)
        inside_Rg = clamped_Rg == rounded_Rg
        passed_Rg = grad_Rg * inside_Rg
        # clamped - U/s inside and clamped outside, written without a branch.
        grad_scale_R1 = (grad_Rg * clamped_Rg).sub_(passed_Rg * steps_Rg).sum(1, keepdim=True)
        grad_zero_point_R1 = None
        if not spec.symmetric:
            grad_zero_point_R1 = (passed_Rg - grad_Rg).sum(1, keepdim=True) * scale_R1
        grad_s2_Rg = grad_s3_R1 = None
        if s2_Rg is not None:
            grad_s2_Rg = divided_Rg.mul_(passed_Rg).neg_()
            grad_s3_R1 = grad_s2_Rg.sum(1, keepdim=True)
        return None, grad_s2_Rg, grad_s3_R1, grad_scale_R1, grad_zero_point_R1, None


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
