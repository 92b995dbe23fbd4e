"""What values a weight may take, and how their scales are kept.

Shapes: a weight [O, I] (output, input channels) is handled as rows [R, g], one row per scale: R = O and g = I per
channel, R = O * I / g and g = group size otherwise. Values of a row are [R, 1]. Everything is float32.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

SCALE_FLOOR = torch.finfo(torch.float32).eps  # AIMET's smallest scale
SCALE_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
CHUNK = 1 << 22  # values: 16 MiB in float32


def row_chunks(rows: Tensor) -> Iterator[slice]:
    """Neighbouring rows of a matrix, so many that computing with them takes little memory; at least one slice."""
    num = max(1, CHUNK // max(1, rows.shape[1]))
    return (slice(start, start + num) for start in range(0, max(1, len(rows)), num))


@dataclass(frozen=True, kw_only=True)
class Grid(ABC):
    """A grid: the levels that a weight's values are rounded to, under a scale for each row.

    A value is `level * scale`. The levels, in steps from 0, are the same in every row, but that a zero point may shift
    them. A code is the whole number that a level is stored as. Compiled kernels take a grid as an argument and are
    made for its fields, so a grid never changes and equals every other of the same fields.

    Attributes:
        bits: of a code.
        group_size: how many neighbouring input channels share a scale; None: all of an output channel (per-channel).
        scale_dtype: what scales are rounded to before codes are made, so that a program that keeps them in it serves
            what was measured; None: they are float32.

    Raises:
        ValueError: there is no such grid; names the field, its value and what is allowed.
    """

    bits: int
    group_size: int | None = None
    scale_dtype: str | None = None
    most_bits: ClassVar[int] = 8  # codes of weights are kept in bytes

    def __post_init__(self) -> None:
        size, dtype = self.group_size, self.scale_dtype
        self._require(2 <= self.bits <= self.most_bits, "bits", f"between 2 and {self.most_bits}")
        self._require(size is None or size >= 2, "group_size", "at least 2, or null for per-channel")
        self._require(dtype is None or dtype in SCALE_DTYPES, "scale_dtype", f"one of {', '.join(SCALE_DTYPES)}")

    def _require(self, holds: bool, field: str, allowed: str) -> None:
        """Raise the class's ValueError about a field where a condition does not hold."""
        if not holds:
            raise ValueError(f"{field}: {getattr(self, field)} is not allowed, it must be {allowed}")

    # What it is called, and what it takes.

    @property
    def name(self) -> str:
        """What folders are named after."""
        return f"w{self.bits}" + (f"-g{self.group_size}" if self.group_size else "")

    @property
    @abstractmethod
    def description(self) -> str:
        """In words that go on a sentence: its kind, and what shares a scale."""

    def as_dict(self) -> dict[str, object]:
        """The fields, from which a file makes the grid again."""
        return asdict(self)

    @property
    def extent(self) -> str:
        """In words, what shares a scale."""
        return f"in groups of {self.group_size}" if self.group_size else "per-channel"

    def divides(self, num_inputs: int) -> bool:
        """Whether its groups divide so many input channels."""
        return num_inputs % (self.group_size or num_inputs) == 0

    def num_groups(self, num_inputs: int) -> int:
        """Scales of an output channel."""
        return num_inputs // (self.group_size or num_inputs)

    def num_scales(self, num_outputs: int, num_inputs: int) -> int:
        """Scales of a weight."""
        return num_outputs * self.num_groups(num_inputs)

    def rows(self, weight_OI: Tensor) -> Tensor:
        """View a weight [O, I] as rows [R, g] that each have one scale."""
        return weight_OI.reshape(-1, self.group_size or weight_OI.shape[1])

    # Levels and codes.

    @property
    @abstractmethod
    def qmin(self) -> int:
        """Smallest code."""

    @property
    @abstractmethod
    def num_steps(self) -> int:
        """Steps between the smallest and the largest level."""

    @abstractmethod
    def nearest(self, steps_Rg: Tensor, zero_point_R1: Tensor) -> Tensor:
        """The levels nearest to values in steps from 0 (half to even)."""

    @abstractmethod
    def is_inside(self, steps_Rg: Tensor, levels_Rg: Tensor) -> Tensor:
        """Where `levels_Rg`, the nearest of `steps_Rg`, is not the grid's end for a value beyond it (bool)."""

    @abstractmethod
    def encode(self, rows_Rg: Tensor, scale_R1: Tensor, zero_point_R1: Tensor) -> Tensor:
        """Codes of the nearest grid points, int8."""

    @abstractmethod
    def decode(self, codes_Rg: Tensor, scale_R1: Tensor, zero_point_R1: Tensor) -> Tensor:
        """Grid points of codes, float32."""

    # From the ends of a row to its scale and zero point.

    @abstractmethod
    def start_range(self, rows_Rg: Tensor) -> tuple[Tensor, Tensor]:
        """Ends min_R1 <= 0 and max_R1 > 0 of the min-max grid of each row, the start that learnable clipping scales."""

    def scale_of(self, min_R1: Tensor, max_R1: Tensor, num_groups: int | None = None) -> Tensor:
        """Step of the grid between two ends, in weight units. Its sign is that of `max - min`.

        Rounded to what is kept (`kept_scale`), so that search, training and codes all see that step.

        Args:
            num_groups: neighbouring rows that are one output channel; where scales are kept together they are needed.
        """
        return self.kept_scale(self.floored((max_R1 - min_R1) / self.num_steps), num_groups)

    def floored(self, scale_R1: Tensor) -> Tensor:
        """Scales no nearer to 0 than SCALE_FLOOR."""
        return scale_R1.clamp(min=SCALE_FLOOR)

    def kept_scale(self, scale_R1: Tensor, num_groups: int | None = None) -> Tensor:
        """The nearest scales that the grid can keep.

        Args:
            num_groups: as `scale_of`'s.
        """
        return scale_R1.to(self.kept_dtype).float() if self.kept_dtype else scale_R1

    def zero_point_of(self, min_R1: Tensor, scale_R1: Tensor) -> Tensor:
        """The code that stands for 0, where it differs from row to row; 0 where it does not."""
        return torch.zeros_like(scale_R1)

    def range_gradients(
        self, grad_scale_R1: Tensor, grad_zero_point_R1: Tensor, scale_R1: Tensor, min_R1: Tensor, max_R1: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Gradients of the ends from those of scale and zero point, whose rounding passes them straight through."""
        step_R1 = (max_R1 - min_R1) / self.num_steps
        moves_R1 = self.floored(step_R1) == step_R1
        grad_end_R1 = torch.where(moves_R1, grad_scale_R1, 0.0) / self.num_steps
        return -grad_end_R1, grad_end_R1

    @property
    def row_by_row(self) -> "Grid":
        """The grid of one row only: its scale is kept without regard to the others."""
        return self

    def with_scales_in(self, dtype: str | None) -> Self:
        """The same grid, its scales rounded to a dtype by name.

        Raises:
            ValueError: they cannot be.
        """
        return replace(self, scale_dtype=dtype)

    # Which scales and zero points there are.

    @property
    def kept_dtype(self) -> torch.dtype | None:
        """What scales are rounded to; None: they are not."""
        return SCALE_DTYPES[self.scale_dtype] if self.scale_dtype else None

    @property
    def has_zero_point(self) -> bool:
        """Whether zero points differ from 0, so that they have to be kept."""
        return False

    @property
    def has_signed_scales(self) -> bool:
        """Whether scales may be negative."""
        return False

    def allows_scales(self, scale_OG: Tensor) -> bool:
        """Whether every scale is one of the grid's: finite and positive."""
        return bool((torch.isfinite(scale_OG) & (scale_OG > 0)).all())

    def allows_zero_points(self, zero_point_OG: Tensor) -> bool:
        """Whether every zero point is one of the grid's."""
        return not zero_point_OG.any()

    def positive(self, scale_OG: Tensor, zero_point_OG: Tensor) -> tuple[Tensor, Tensor, "Grid"]:
        """Positive scales, with their zero points and grid, of the same values; codes `q` under negative ones become
        `-1 - q`."""
        return scale_OG, zero_point_OG, self
