"""Codes and scales as GPTQ packs them, for vLLM, and for transformers with GPTQModel."""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from shardq.export.base import Grids, only_grid
from shardq.export.checkpoint import LOAD_PLAIN, VLLM_ALONE, Checkpoint, check_linears, in_transformers, with_vllm
from shardq.formats import gptq
from shardq.model.skeleton import Skeleton
from shardq.quant.activation import ActivationGrid
from shardq.quant.grid import Grid
from shardq.quant.quantized import QuantizedLinear


class Gptq(Checkpoint):
    """A GPTQ checkpoint."""

    name = "gptq"
    rounded_by = "vllm"

    def check(self, skeleton: Skeleton, grids: Grids) -> None:
        gptq.check_grid(only_grid(self.name, grids))
        check_linears(self.name, skeleton, grids)
        for name in grids:
            gptq.check_shape(name, *skeleton.tensor(f"{name}.weight").shape)

    def linear_tensors(
        self, name: str, linear: QuantizedLinear, dtype: torch.dtype, entering: ActivationGrid | None
    ) -> dict[str, Tensor]:
        return gptq.linear_tensors(name, linear, dtype)

    def described(self, run: Path, skeleton: Skeleton, grids: Grids, ignored: Iterable[str]) -> dict:
        return gptq.quantization_config(only_grid(self.name, grids), ignored)

    def is_served(self, grid: Grid) -> bool:
        return gptq.is_served_by_vllm(grid)

    def how_to_serve(self, grids: Grids, factory: str) -> str:
        if not factory:
            return VLLM_ALONE
        loaded = in_transformers("gptqmodel optimum", LOAD_PLAIN.format(factory=factory))
        return with_vllm(loaded) if self.is_served(only_grid(self.name, grids)) else f"W{loaded[1:]}"
