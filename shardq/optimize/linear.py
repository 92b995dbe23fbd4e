"""A linear whose weight is fake-quantized by AdaScale on each forward."""

from typing import Literal

import torch
from torch import Tensor, nn

from shardq.quant import adascale, affine
from shardq.quant.quantized import QuantizedLinear
from shardq.quant.spec import QuantSpec

Method = Literal["adascale", "flexround", "lwc", "rtn"]


class AdaScaleLinear(nn.Module):
    """Replaces a linear while its quantizer is trained.

    The method chooses what is trained: `adascale` beta, gamma, s2, s3; `flexround` s2, s3 and `step`, one logarithm
    for both ends of the grid; `lwc` beta and gamma; `rtn` nothing. Everything starts at 0, which is round-to-nearest
    on the min-max grid. Parameters are float32; the frozen weight, its grid and the bias are buffers.
    """

    def __init__(self, linear: nn.Linear, spec: QuantSpec, method: Method):
        super().__init__()
        self.spec = spec
        self.original = [linear]  # in a list: not a submodule, whose weight would be counted twice
        rows_Rg = affine.to_rows(linear.weight.detach(), spec)
        min_R1, max_R1 = affine.start_range(rows_Rg, spec)
        self.register_buffer("rows", rows_Rg)
        self.register_buffer("min", min_R1)
        self.register_buffer("max", max_R1)
        self.register_buffer("bias", linear.bias)
        trains_weight, trains_ends = method in ("adascale", "flexround"), method in ("adascale", "lwc")
        self.s2 = _parameter(rows_Rg) if trains_weight else None
        self.s3 = _parameter(min_R1) if trains_weight else None
        self.step = _parameter(min_R1) if method == "flexround" else None
        self.beta = _parameter(min_R1) if trains_ends else None
        self.gamma = _parameter(min_R1) if trains_ends else None

    def grid(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point [R, 1] as trained so far; differentiable."""
        if self.step is not None:
            return adascale.learned_grid(self.min, self.max, self.step, self.step, self.spec)
        if self.beta is not None:
            return adascale.learned_grid(self.min, self.max, self.beta, self.gamma, self.spec)
        scale_R1 = affine.scale_of(self.min, self.max, self.spec)
        return scale_R1, affine.zero_point_of(self.min, scale_R1, self.spec)

    def forward(self, inputs: Tensor) -> Tensor:
        """The linear's output with the fake-quantized weight."""
        scale_R1, zero_point_R1 = self.grid()
        rows_Rg = adascale.FakeQuantize.apply(self.rows, self.s2, self.s3, scale_R1, zero_point_R1, self.spec)
        return nn.functional.linear(inputs, rows_Rg.view_as(self.original[0].weight), self.bias)

    @torch.no_grad()
    def folded(self) -> QuantizedLinear:
        """Codes and grid that the trained quantizer becomes."""
        scale_R1, zero_point_R1 = self.grid()
        codes_Rg = adascale.fold(self.rows, self.s2, self.s3, scale_R1, zero_point_R1, self.spec)
        weight_OI = self.original[0].weight
        num_outputs = weight_OI.shape[0]
        return QuantizedLinear(
            codes_Rg.view_as(weight_OI),
            scale_R1.reshape(num_outputs, -1),
            zero_point_R1.reshape(num_outputs, -1),
            self.spec,
        )


def _parameter(like: Tensor) -> nn.Parameter:
    return nn.Parameter(torch.zeros_like(like))
