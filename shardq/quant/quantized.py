"""The result of quantizing one linear."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from shardq.quant.grid import Grid, row_chunks


@dataclass(frozen=True)
class QuantizedLinear:
    """Codes and grid of one linear's weight.

    Attributes:
        codes_OI: int8, output and input channels.
        scale_OG: float32, weight units per step, positive unless the grid has signed scales; G groups of I / G input
            channels, G = 1 per channel.
        zero_point_OG: float32 holding integers, 0 on a grid without zero points.
    """

    codes_OI: Tensor
    scale_OG: Tensor
    zero_point_OG: Tensor
    grid: Grid

    @property
    def has_valid_scales(self) -> bool:
        """Whether every scale is one of the grid's."""
        return self.grid.allows_scales(self.scale_OG)

    def of(self, outputs: slice) -> "QuantizedLinear":
        """Some of the output channels; a view."""
        return replace(
            self,
            codes_OI=self.codes_OI[outputs],
            scale_OG=self.scale_OG[outputs],
            zero_point_OG=self.zero_point_OG[outputs],
        )

    def to(self, device: torch.device) -> "QuantizedLinear":
        """The same on a device."""
        parts = {name: getattr(self, name).to(device) for name in ("codes_OI", "scale_OG", "zero_point_OG")}
        return replace(self, **parts)

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [O, I] that the codes stand for, computed in float32 and rounded to `dtype` at the end."""
        rows_Rg = self.grid.rows(self.codes_OI)
        scale_R1, zero_point_R1 = self.scale_OG.reshape(-1, 1), self.zero_point_OG.reshape(-1, 1)
        values_Rg = torch.empty_like(rows_Rg, dtype=dtype)
        for some in row_chunks(rows_Rg):
            values_Rg[some] = self.grid.decode(rows_Rg[some], scale_R1[some], zero_point_R1[some])
        return values_Rg.reshape(self.codes_OI.shape)

    def rescaled(self, log_factor_OG: Tensor) -> "QuantizedLinear":
        """The same codes under scales times exp(log_factor), each the nearest that the grid can keep."""
        scale_OG = self.scale_OG * log_factor_OG.exp()
        kept_R1 = self.grid.kept_scale(scale_OG.reshape(-1, 1), scale_OG.shape[1])
        return replace(self, scale_OG=kept_R1.view(scale_OG.shape))

    def with_positive_scales(self) -> "QuantizedLinear":
        """The same weight with positive scales only (`Grid.positive`)."""
        if not self.grid.has_signed_scales:
            return self
        rows_Rg = self.grid.rows(self.codes_OI)
        codes_Rg = torch.where(self.scale_OG.reshape(-1, 1) < 0, -1 - rows_Rg, rows_Rg)
        return QuantizedLinear(codes_Rg.reshape(self.codes_OI.shape), *self.positive_grid)

    @property
    def positive_grid(self) -> tuple[Tensor, Tensor, Grid]:
        """Scales, zero points and grid of `with_positive_scales`, without its codes."""
        return self.grid.positive(self.scale_OG, self.zero_point_OG)
