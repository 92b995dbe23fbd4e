"""The trainable quantizer of one linear's weight."""

from typing import Literal

import torch
from torch import Tensor, nn

from shardq.errors import QuantizationError
from shardq.quant import adascale, search
from shardq.quant.grid import Grid, row_chunks
from shardq.quant.quantized import QuantizedLinear

Method = Literal["adascale", "flexround", "lwc", "rtn"]


class LinearQuantizer(nn.Module):
    """AdaScale's parameters for one weight, allocated once and reused for each block's weight of that shape.

    The method chooses what is trained: `adascale` beta, gamma, s2, s3; `flexround` s2, s3 and `step`, one logarithm
    for both ends of the grid; `lwc` beta and gamma; `rtn` nothing. Parameters are float32. The frozen weight is kept
    in the source's dtype, and only between `start` and `release`.
    """

    def __init__(self, weight_OI: Tensor, grid: Grid, method: Method):
        """Allocate for weights of the shape, and on the device, of `weight_OI`."""
        super().__init__()
        self.grid = grid
        self.rows: Tensor | None = None
        self.shape = weight_OI.shape
        rows_Rg = grid.rows(weight_OI)
        self.num_groups = grid.num_groups(weight_OI.shape[1])
        row_R1 = rows_Rg[:, :1]
        self.register_buffer("min", _zeros(row_R1))
        self.register_buffer("max", _zeros(row_R1))
        trains_weight, trains_ends = method in ("adascale", "flexround"), method in ("adascale", "lwc")
        self.s2 = nn.Parameter(_zeros(rows_Rg)) if trains_weight else None
        self.s3 = nn.Parameter(_zeros(row_R1)) if trains_weight else None
        self.step = nn.Parameter(_zeros(row_R1)) if method == "flexround" else None
        self.beta = nn.Parameter(_zeros(row_R1)) if trains_ends else None
        self.gamma = nn.Parameter(_zeros(row_R1)) if trains_ends else None

    @torch.no_grad()
    def start(self, weight_OI: Tensor, importance_I: Tensor | None = None) -> None:
        """Take a weight of any float dtype and go to the start, round-to-nearest; in place.

        Args:
            importance_I: weight of each input channel in the search of the start grid (`quant/search.py`). None:
                the start grid holds the extremes (min-max).
        """
        self._hold(self.grid.rows(weight_OI))
        ends = [self.grid.start_range(self.rows[some].float()) for some in row_chunks(self.rows)]
        min_R1, max_R1 = (torch.cat(parts) for parts in zip(*ends, strict=True))
        if importance_I is not None:
            importance_Gg = importance_I.view(-1, self.rows.shape[1])
            min_R1, max_R1 = search.searched_range(self.rows, importance_Gg, min_R1, max_R1, self.grid)
        self.min.copy_(min_R1)
        self.max.copy_(max_R1)
        self.restart()

    @torch.no_grad()
    def restart(self) -> None:
        """Go back to the start for the same weight; in place."""
        for parameter in self.parameters():
            if parameter.requires_grad:
                parameter.zero_()
                parameter.grad = None

    def release(self) -> None:
        """Free the frozen weight."""
        self._hold(None)

    def make_shardable(self, dtype: torch.dtype) -> None:
        """Keep the frozen weight as a parameter of that dtype, so that ZeRO can shard it with the others."""
        rows_Rg = self.min.new_empty(len(self.min), self.shape.numel() // len(self.min), dtype=dtype)
        self.rows = nn.Parameter(rows_Rg, requires_grad=False)

    def _hold(self, rows_Rg: Tensor | None) -> None:
        if not isinstance(self.rows, nn.Parameter):
            self.rows = rows_Rg
        elif rows_Rg is not None:  # without a weight, a shard keeps its memory for the next block
            if rows_Rg.dtype != self.rows.dtype:
                raise QuantizationError(
                    f"one linear's weight is in {rows_Rg.dtype}, another's in {self.rows.dtype}, which sharded weights "
                    "cannot be; use parallel.engine zero2 or allreduce"
                )
            self.rows.data = rows_Rg

    @property
    def trained(self) -> adascale.Trained:
        """The parameters in AdaScale's terms: `step` takes the place of both beta and gamma."""
        ends = (self.beta, self.gamma) if self.step is None else (self.step, self.step)
        return adascale.Trained(self.s2, self.s3, *ends)

    def forward(self, dtype: torch.dtype, kernels: adascale.Kernels) -> Tensor:
        """The fake-quantized weight [O, I] in `dtype`; differentiable."""
        rows_Rg = adascale.FakeQuantize.apply(
            kernels, self.grid, self.num_groups, dtype, self.rows, self.min, self.max, *self.trained
        )
        return rows_Rg.view(self.shape)

    @torch.no_grad()
    def folded(self) -> QuantizedLinear:
        """The codes and the grid of the trained quantizer."""
        scale_R1, zero_point_R1 = adascale.learned_grid((self.min, self.max), self.trained, self.grid, self.num_groups)
        codes_Rg = adascale.fold(self.rows, self.s2, self.s3, scale_R1, zero_point_R1, self.grid)
        return QuantizedLinear(
            codes_Rg.view(self.shape),
            scale_R1.reshape(-1, self.num_groups),
            zero_point_R1.reshape(-1, self.num_groups),
            self.grid,
        )


def _zeros(like: Tensor) -> Tensor:
    return torch.zeros_like(like, dtype=torch.float32, memory_format=torch.contiguous_format)
