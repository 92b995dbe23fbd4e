"""Codes and scales as compressed-tensors, for vLLM and transformers."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from shardq.export.base import Grids, only_grid
from shardq.export.checkpoint import (
    LOAD_PLAIN,
    VLLM_ALONE,
    Checkpoint,
    check_linears,
    in_transformers,
    input_grids,
    with_vllm,
)
from shardq.formats import compressed_tensors
from shardq.formats.block_file import read_activations, read_grids
from shardq.logs import Display
from shardq.model.skeleton import Skeleton
from shardq.quant.activation import ActivationGrid
from shardq.quant.grid import Grid
from shardq.quant.quantized import QuantizedLinear
from shardq.rundir.folder import RunFolder
from shardq.rundir.record import RunRecord

# Left packed, transformers 5.23 makes room for unpacked zero points only.
LOAD_ASYMMETRIC = """{factory}.from_pretrained(
    "path/to/this/folder", quantization_config=CompressedTensorsConfig(dequantize=True)
)"""


@dataclass(frozen=True)
class CompressedTensors(Checkpoint):
    """A compressed-tensors checkpoint, with activations as they are or in int8."""

    name = "compressed-tensors"
    rounded_by = "vllm"
    activation_bits: int

    @property
    def options(self) -> dict[str, object]:
        return {"activation_bits": self.activation_bits}

    def check(self, skeleton: Skeleton, grids: Grids) -> None:
        compressed_tensors.check_grid(only_grid(self.name, grids), self.activation_bits)
        check_linears(self.name, skeleton, grids)

    def matrix_bytes(self, shape: tuple[int, ...], grid: Grid, itemsize: int) -> int:
        if self.activation_bits == 8:
            return math.prod(shape)  # a byte each at any width
        return super().matrix_bytes(shape, grid, itemsize)

    def linear_tensors(
        self, name: str, linear: QuantizedLinear, dtype: torch.dtype, entering: ActivationGrid | None
    ) -> dict[str, Tensor]:
        inputs = {name: entering} if entering else {}
        return compressed_tensors.linear_tensors(name, linear, dtype, self.activation_bits, inputs)

    def described(self, run: Path, skeleton: Skeleton, grids: Grids, ignored: Iterable[str]) -> dict:
        paths = [RunFolder(run).block(number) for number in range(len(skeleton.names))]
        inputs = [
            grid for path in paths for grid in input_grids(self, read_grids(path), read_activations(path)).values()
        ]
        grid = only_grid(self.name, grids)
        return compressed_tensors.quantization_config(grid, self.activation_bits, ignored, *inputs[:1])

    def write(self, skeleton: Skeleton, grids: Grids, folder: Path, display: Display, is_begun: bool) -> float:
        scale_change = super().write(skeleton, grids, folder, display, is_begun)
        if RunRecord.read(skeleton.folder).manifest()["options"].get("activations", {}).get("kv_bits"):
            display.line(f"{folder}: without the run's grids of keys and values; vLLM would take float8 alone")
        return scale_change

    def how_to_serve(self, grids: Grids, factory: str) -> str:
        if not factory:
            return VLLM_ALONE
        grid = only_grid(self.name, grids)
        load = LOAD_ASYMMETRIC if grid.has_zero_point else LOAD_PLAIN
        return with_vllm(in_transformers("compressed-tensors", load.format(factory=factory)))
