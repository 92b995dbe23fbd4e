"""The base class of every format that other programs read."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar, Literal

import torch

from shardq.errors import ConfigError
from shardq.formats.options import FormatName
from shardq.formats.source import SourceTensor
from shardq.logs import Display
from shardq.model.skeleton import Skeleton
from shardq.quant.grid import Grid
from shardq.rundir.room import other_bytes

Grids = dict[str, Grid]  # by full name of the linear


class Format(ABC):
    """A format, with the export options that belong to it.

    Attributes:
        name: name of the format in options, and of its folder.
        package: the package that writes the format, if it is an extra.
        rounded_by: the --target that rounds scales, before codes are made, to the format's dtype of scales; None if the
            format keeps float32 scales.
        holds_weights: whether all of the model's weights are in the format.
        is_of_text: whether only what the text decoder computes with is in the format.
        activation_bits: bits of the activations that the format asks for.
    """

    name: ClassVar[FormatName]
    package: ClassVar[str | None] = None
    rounded_by: ClassVar[Literal["vllm", "gguf"] | None] = None
    holds_weights: ClassVar[bool] = True
    is_of_text: ClassVar[bool] = False
    activation_bits: int = 16

    @property
    def options(self) -> dict[str, object]:
        """Options that belong to this format, by name, with their values."""
        return {}

    @abstractmethod
    def check(self, skeleton: Skeleton, grids: Grids) -> None:
        """Check, before any work, that the format can hold a model with its linears on some grids.

        Raises:
            ConfigError: a grid or a size does not fit.
            UnsupportedModelError: the format has no place for the model.
        """

    def scale_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Dtype to which the target rounds scales, in a model of some dtype."""
        return dtype if dtype is torch.float16 else torch.bfloat16

    def is_served(self, grid: Grid) -> bool:
        """Whether the target's program loads the format on a grid that `check` accepts."""
        return True

    @abstractmethod
    def matrix_bytes(self, shape: tuple[int, ...], grid: Grid, itemsize: int) -> int:
        """Approximate bytes of a quantized weight [O, I].

        Args:
            itemsize: bytes of a value in the source's dtype.
        """

    def block_bytes(self, tensors: dict[str, SourceTensor], grids: Grids, itemsize: int) -> int:
        """Approximate bytes of a block.

        Args:
            tensors: all tensors of the block, by name within it.
            grids: grids of the quantized ones, by the same name.
            itemsize: as in `matrix_bytes`.
        """
        others = other_bytes(tensors, grids) if self.holds_weights else 0
        return others + sum(self.matrix_bytes(tensors[name].shape, grid, itemsize) for name, grid in grids.items())

    @abstractmethod
    def write(self, skeleton: Skeleton, grids: Grids, folder: Path, display: Display, is_begun: bool) -> float:
        """Write a finished run; return the largest relative change of a weight by the rounding of its scale.

        Args:
            skeleton: skeleton of the run's result.
            is_begun: whether existing shards are those of this run's blocks, and stay.

        Raises:
            ConfigError, UnsupportedModelError: as `check`.
            QuantizationError: a weight or a scale is beyond the dtype that the format keeps it in.
        """

    @abstractmethod
    def how_to_serve(self, grids: Grids, factory: str) -> str:
        """Markdown that says how a program loads it; `factory` is the class of transformers that does, or ""."""


def only_grid(format_name: str, grids: Grids) -> Grid:
    """The common grid of all linears, for a format that describes one grid for the model.

    Raises:
        ConfigError: the linears have several grids; names two.
    """
    (first, grid), *others = grids.items()
    for name, other in others:
        if other != grid:
            raise ConfigError(
                f"format: {format_name} has one grid for the whole model, but {first} is on {grid.bits} bits, "
                f"{grid.description}, and {name} on {other.bits} bits, {other.description}; choose another format"
            )
    return grid
