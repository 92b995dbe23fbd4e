"""Plain weights, for anything that loads Hugging Face checkpoints."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from shardq.export.base import Grids
from shardq.export.checkpoint import LOAD_PLAIN, Checkpoint
from shardq.formats.checkpoint import plain_tensors
from shardq.model.skeleton import Skeleton
from shardq.quant.activation import ActivationGrid
from shardq.quant.grid import Grid
from shardq.quant.quantized import QuantizedLinear


@dataclass(frozen=True)
class Hf(Checkpoint):
    """Dequantized weights, which are grid points, in float32 or the source's dtype."""

    name = "hf"
    dtype: Literal["float32", "source"]

    @property
    def options(self) -> dict[str, object]:
        return {"dtype": self.dtype}

    def check(self, skeleton: Skeleton, grids: Grids) -> None:
        """Every grid fits."""

    def matrix_bytes(self, shape: tuple[int, ...], grid: Grid, itemsize: int) -> int:
        return math.prod(shape) * (4 if self.dtype == "float32" else itemsize)

    def weight_dtype(self, skeleton: Skeleton, grid: Grid) -> torch.dtype:
        return torch.float32 if self.dtype == "float32" else super().weight_dtype(skeleton, grid)

    def linear_tensors(
        self, name: str, linear: QuantizedLinear, dtype: torch.dtype, entering: ActivationGrid | None
    ) -> dict[str, Tensor]:
        return plain_tensors(name, linear, dtype)

    def how_to_serve(self, grids: Grids, factory: str) -> str:
        return f"The weights are plain:\n\n```python\n{LOAD_PLAIN.format(factory=factory)}\n```"
