"""The result of quantizing one linear."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from shardq.quant import affine
from shardq.quant.spec import QuantSpec


@dataclass(frozen=True)
class QuantizedLinear:
    """Codes and grid of one linear's weight.

    Attributes:
        codes_OI: int8, output and input channels.
        scale_OG: float32, weight units per code, positive but on a full-range grid; G groups of I / G input channels,
            G = 1 per channel.
        zero_point_OG: float32 holding integers, 0 on a symmetric grid.
    """

    codes_OI: Tensor
    scale_OG: Tensor
    zero_point_OG: Tensor
    spec: QuantSpec

    @property
    def has_valid_scales(self) -> bool:
        """Whether every scale is finite and positive; on a full-range grid, finite and not zero.

        On a two-level grid, a whole multiple of its channel's, to the bit, too.
        """
        signed_OG = self.scale_OG.abs() if self.spec.full_range else self.scale_OG
        is_valid_OG = torch.isfinite(self.scale_OG) & (signed_OG > 0)
        if self.spec.decompressed_bits:
            multiplier_OG, channel_O1 = affine.two_levels(self.scale_OG, self.spec)
            is_valid_OG &= multiplier_OG * channel_O1 == self.scale_OG
        return bool(is_valid_OG.all())

    def of(self, outputs: slice) -> "QuantizedLinear":
        """Some of the output channels; a view."""
        return replace(
            self,
            codes_OI=self.codes_OI[outputs],
            scale_OG=self.scale_OG[outputs],
            zero_point_OG=self.zero_point_OG[outputs],
        )

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [O, I] that the codes stand for, computed in float32 and rounded to `dtype` at the end."""
        rows_Rg = affine.to_rows(self.codes_OI, self.spec)
        scale_R1, zero_point_R1 = self.scale_OG.reshape(-1, 1), self.zero_point_OG.reshape(-1, 1)
        values_Rg = torch.empty_like(rows_Rg, dtype=dtype)
        for some in affine.row_chunks(rows_Rg):
            values_Rg[some] = affine.dequantize(rows_Rg[some], scale_R1[some], zero_point_R1[some])
        return values_Rg.reshape(self.codes_OI.shape)

    def rescaled(self, log_factor_OG: Tensor) -> "QuantizedLinear":
        """The same codes under scales times exp(log_factor), each the nearest that the grid can keep."""
        scale_OG = self.scale_OG * log_factor_OG.exp()
        kept_R1 = affine.kept_scale(scale_OG.reshape(-1, 1), self.spec, scale_OG.shape[1])
        return replace(self, scale_OG=kept_R1.view(scale_OG.shape))

    def with_positive_scales(self) -> "QuantizedLinear":
        """The same weight with positive scales alone: on a full-range grid, as the asymmetric grid that it equals.

        Under a negative scale s a code q becomes -1 - q, and its zero point -1: (-1 - q + 1) * |s| = q * s.
        """
        if not self.spec.full_range:
            return self
        rows_Rg = affine.to_rows(self.codes_OI, self.spec)
        codes_Rg = torch.where(self.scale_OG.reshape(-1, 1) < 0, -1 - rows_Rg, rows_Rg)
        return QuantizedLinear(codes_Rg.reshape(self.codes_OI.shape), *self.positive_grid)

    @property
    def positive_grid(self) -> tuple[Tensor, Tensor, QuantSpec]:
        """Scales, zero points and grid of `with_positive_scales`, without its codes."""
        if not self.spec.full_range:
            return self.scale_OG, self.zero_point_OG, self.spec
        spec = replace(self.spec, symmetric=False, full_range=False)
        return self.scale_OG.abs(), -(self.scale_OG < 0).float(), spec
