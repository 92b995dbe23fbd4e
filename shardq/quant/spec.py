"""What grid a weight is rounded to."""

from dataclasses import dataclass

MAX_DECOMPRESSED_BITS = 16
DEFAULT_IGNORE = ("lm_head", "*embed*")  # linears that are never quantized


@dataclass(frozen=True, kw_only=True)
class QuantSpec:
    """An integer grid for the weight of a linear.

    Codes are signed, `qmin <= code <= qmax`, and stand for `(code - zero_point) * scale`. A symmetric grid has
    no zero point (it is 0). `group_size` is how many neighbouring input channels share one scale; None: all of
    an output channel's (per-channel). `full_range` lets the scale of a symmetric grid be negative, so that the one code
    more on the side of `qmin` serves the side where the row reaches further. `decompressed_bits` makes the scales of a
    symmetric grid in groups two-level (LPBQ): a whole multiple, 1 to `max_multiplier`, of one scale of the output
    channel, so that `multiplier * code` are codes of so many bits on a per-channel grid. `scale_dtype` (a name such as
    `bfloat16`) is what scales are rounded to before codes are made, so that a program that keeps them in it serves what
    was measured; None: they are float32.
    """

    bits: int
    symmetric: bool = True
    group_size: int | None = None
    full_range: bool = False
    decompressed_bits: int | None = None
    scale_dtype: str | None = None

    @property
    def qmin(self) -> int:
        """Smallest code."""
        # A power, not a shift: compiled code takes `bits` as a symbol, which torch 2.11 cannot shift by.
        return -(2 ** (self.bits - 1))

    @property
    def qmax(self) -> int:
        """Largest code."""
        return 2 ** (self.bits - 1) - 1

    @property
    def num_steps(self) -> int:
        """Steps between the smallest and the largest code."""
        return self.qmax - self.qmin

    @property
    def max_multiplier(self) -> int:
        """Largest multiple of its channel's scale that a group's may be on a two-level grid."""
        assert self.decompressed_bits is not None, "not a two-level grid"
        return 1 << (self.decompressed_bits - self.bits)
