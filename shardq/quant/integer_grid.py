"""Integer grids: evenly spaced levels, `(code - zero_point) * scale`."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from shardq.quant.grid import SCALE_FLOOR, Grid

MAX_DECOMPRESSED_BITS = 16


@dataclass(frozen=True, kw_only=True)
class IntegerGrid(Grid):
    """An integer grid.

    Codes are signed, `qmin <= code <= qmax`, and stand for `(code - zero_point) * scale`. A symmetric grid has
    no zero point (it is 0). `full_range` lets the scale of a symmetric grid be negative, so that the one code more on
    the side of `qmin` serves the side where the row reaches further. `decompressed_bits` makes the scales of a
    symmetric grid in groups two-level (LPBQ): a whole multiple, 1 to `max_multiplier`, of one scale of the output
    channel, so that `multiplier * code` are codes of so many bits on a per-channel grid.
    """

    symmetric: bool = True
    full_range: bool = False
    decompressed_bits: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(
            self.symmetric or not self.full_range,
            "full_range",
            "false beside symmetric false: a zero point already uses every code",
        )
        if self.decompressed_bits is not None:
            self._require(
                self.symmetric and self.group_size is not None and not self.full_range,
                "decompressed_bits",
                "left out but for symmetric grids in groups that are not full-range",
            )
            self._require(
                self.bits < self.decompressed_bits <= MAX_DECOMPRESSED_BITS,
                "decompressed_bits",
                f"above bits ({self.bits}), at most {MAX_DECOMPRESSED_BITS}",
            )
            self._require(
                self.scale_dtype is None,
                "decompressed_bits",
                f"left out where scales are kept in {self.scale_dtype}, in which they are no whole multiples",
            )

    @property
    def qmin(self) -> int:
        # A power, not a shift: compiled code takes `bits` as a symbol, which torch 2.11 cannot shift by.
        return -(2 ** (self.bits - 1))

    @property
    def qmax(self) -> int:
        """Largest code."""
        return 2 ** (self.bits - 1) - 1

    @property
    def num_steps(self) -> int:
        return self.qmax - self.qmin

    @property
    def max_multiplier(self) -> int:
        """Largest multiple of its channel's scale that a group's may be on a two-level grid."""
        assert self.decompressed_bits is not None, "not a two-level grid"
        return 1 << (self.decompressed_bits - self.bits)

    @property
    def description(self) -> str:
        return f"{'symmetric' if self.symmetric else 'asymmetric'}, {self.extent}"

    def nearest(self, steps_Rg: Tensor, zero_point_R1: Tensor) -> Tensor:
        if self.symmetric:  # uncompiled, clamping to numbers is six times as fast as to a tensor's (measured)
            return steps_Rg.round().clamp_(self.qmin, self.qmax)
        return steps_Rg.round().clamp_(self.qmin - zero_point_R1, self.qmax - zero_point_R1)

    def is_inside(self, steps_Rg: Tensor, levels_Rg: Tensor) -> Tensor:
        return levels_Rg == steps_Rg.round()

    def encode(self, rows_Rg: Tensor, scale_R1: Tensor, zero_point_R1: Tensor) -> Tensor:
        codes_Rg = (rows_Rg / scale_R1).round_().add_(zero_point_R1).clamp_(self.qmin, self.qmax)
        return codes_Rg.to(torch.int8)

    def decode(self, codes_Rg: Tensor, scale_R1: Tensor, zero_point_R1: Tensor) -> Tensor:
        return (codes_Rg.float() - zero_point_R1) * scale_R1

    def start_range(self, rows_Rg: Tensor) -> tuple[Tensor, Tensor]:
        """Ends of the min-max grid of each row.

        Symmetric: the smallest step at which `qmin * step` and `qmax * step` enclose the row, as AIMET's min-max
        calibration gives it. Full-range: the step at which `qmin * step` is the row's value furthest from 0, whatever
        its sign (AutoRound's symmetric grid). Asymmetric: the row's own ends, widened to hold 0.

        Returns:
            min_R1 <= 0 and max_R1 > 0; both negated in full-range rows that reach further above 0.
        """
        lowest_R1 = rows_Rg.amin(1, keepdim=True).clamp(max=0)
        highest_R1 = rows_Rg.amax(1, keepdim=True).clamp(min=0)
        # AIMET widens a row that is (nearly) constant by one smallest step for each code.
        widen_R1 = SCALE_FLOOR * ((highest_R1 - lowest_R1) / self.num_steps < SCALE_FLOOR)
        lowest_R1, highest_R1 = lowest_R1 + self.qmin * widen_R1, highest_R1 + self.qmax * widen_R1
        if not self.symmetric:
            return lowest_R1, highest_R1
        if self.full_range:
            step_R1 = torch.where(highest_R1 > -lowest_R1, highest_R1, lowest_R1) / self.qmin
            return self.qmin * step_R1, self.qmax * step_R1
        # At 2 bits AIMET lets the positive end be clipped by one step: {-2, -1, 0, 1} would waste half of the range.
        positive_steps = self.qmax if self.bits > 2 else 2
        step_R1 = torch.maximum(highest_R1 / positive_steps, lowest_R1 / self.qmin)
        return self.qmin * step_R1, self.qmax * step_R1

    def floored(self, scale_R1: Tensor) -> Tensor:
        above_R1 = super().floored(scale_R1)
        return torch.where(scale_R1 < 0, scale_R1.clamp(max=-SCALE_FLOOR), above_R1) if self.full_range else above_R1

    def kept_scale(self, scale_R1: Tensor, num_groups: int | None = None) -> Tensor:
        if not self.decompressed_bits:
            return super().kept_scale(scale_R1, num_groups)
        if num_groups is None:
            raise TypeError("a two-level grid needs the number of groups")
        multiplier_OG, channel_O1 = self.two_levels(scale_R1.reshape(-1, num_groups))
        return (multiplier_OG * channel_O1).reshape(-1, 1)

    def two_levels(self, scale_OG: Tensor) -> tuple[Tensor, Tensor]:
        """Whole multipliers [O, G], as float32, and channels' scales [O, 1] whose products are nearest to the scales.

        A channel's largest scale is `max_multiplier` times the channel's own. Scales that are such products already,
        as float32 rounds them, are taken apart without a change to any bit.

        Source: low-power blockwise quantization, AIMET's `GroupedBlockQuantizeDequantize` with one block group a
        channel.
        """
        # Division by a power of two and multiplication by it are exact, so the largest scale stays what it is.
        channel_O1 = scale_OG.amax(1, keepdim=True) / self.max_multiplier
        return (scale_OG / channel_O1).round().clamp(1, self.max_multiplier), channel_O1

    def zero_point_of(self, min_R1: Tensor, scale_R1: Tensor) -> Tensor:
        if self.symmetric:
            return super().zero_point_of(min_R1, scale_R1)
        return (self.qmin - min_R1 / scale_R1).clamp(self.qmin, self.qmax).round()

    def range_gradients(
        self, grad_scale_R1: Tensor, grad_zero_point_R1: Tensor, scale_R1: Tensor, min_R1: Tensor, max_R1: Tensor
    ) -> tuple[Tensor, Tensor]:
        if self.symmetric:
            return super().range_gradients(grad_scale_R1, grad_zero_point_R1, scale_R1, min_R1, max_R1)
        exact_R1 = self.qmin - min_R1 / scale_R1
        is_inside_R1 = (exact_R1 >= self.qmin) & (exact_R1 <= self.qmax)
        grad_exact_R1 = torch.where(is_inside_R1, grad_zero_point_R1, 0.0)
        grad_scale_R1 = grad_scale_R1 + grad_exact_R1 * min_R1 / scale_R1**2
        grads = super().range_gradients(grad_scale_R1, grad_zero_point_R1, scale_R1, min_R1, max_R1)
        return grads[0] - grad_exact_R1 / scale_R1, grads[1]

    @property
    def row_by_row(self) -> "IntegerGrid":
        return replace(self, decompressed_bits=None)

    @property
    def has_zero_point(self) -> bool:
        return not self.symmetric

    @property
    def has_signed_scales(self) -> bool:
        return self.full_range

    def allows_scales(self, scale_OG: Tensor) -> bool:
        """Whether every scale is finite and positive, or, where it may be negative, not zero.

        On a two-level grid, a whole multiple of its channel's, to the bit, too.
        """
        if not super().allows_scales(scale_OG.abs() if self.full_range else scale_OG):
            return False
        if not self.decompressed_bits:
            return True
        multiplier_OG, channel_O1 = self.two_levels(scale_OG)
        return torch.equal(multiplier_OG * channel_O1, scale_OG)

    def allows_zero_points(self, zero_point_OG: Tensor) -> bool:
        if self.symmetric:
            return super().allows_zero_points(zero_point_OG)
        return not ((zero_point_OG < self.qmin) | (zero_point_OG > self.qmax)).any()

    def positive(self, scale_OG: Tensor, zero_point_OG: Tensor) -> tuple[Tensor, Tensor, Grid]:
        """On a full-range grid, as the asymmetric grid that it equals.

        Under a negative scale s a code q becomes -1 - q, and its zero point -1: (-1 - q + 1) * |s| = q * s.
        """
        if not self.full_range:
            return super().positive(scale_OG, zero_point_OG)
        grid = replace(self, symmetric=False, full_range=False)
        return scale_OG.abs(), -(scale_OG < 0).float(), grid
