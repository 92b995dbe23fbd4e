"""Affine integer grids: range, scale, zero point, codes.

Shapes: a weight [O, I] (output, input channels) is handled as rows [R, g], one row per scale: R = O and g = I per
channel, R = O * I / g and g = group size otherwise. Values of a row are [R, 1]. Everything is float32.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from shardq.quant.spec import QuantSpec

SCALE_FLOOR = torch.finfo(torch.float32).eps  # AIMET's smallest scale
CHUNK = 1 << 22  # values: 16 MiB in float32


def to_rows(weight_OI: Tensor, spec: QuantSpec) -> Tensor:
    """View a weight [O, I] as rows [R, g] that each have one scale."""
    return weight_OI.reshape(-1, spec.group_size or weight_OI.shape[1])


def row_chunks(rows: Tensor) -> Iterator[slice]:
    """Neighbouring rows of a matrix, so many that computing with them takes little memory; at least one slice."""
    num = max(1, CHUNK // max(1, rows.shape[1]))
    return (slice(start, start + num) for start in range(0, max(1, len(rows)), num))


def start_range(rows_Rg: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Ends of the min-max grid of each row, the frozen start that learnable clipping scales.

    Symmetric: the smallest step at which `qmin * step` and `qmax * step` enclose the row, as AIMET's min-max
    calibration gives it. Full-range: the step at which `qmin * step` is the row's value furthest from 0, whatever its
    sign (AutoRound's symmetric grid). Asymmetric: the row's own ends, widened to hold 0.

    Returns:
        min_R1 <= 0 and max_R1 > 0 in weight units; both negated in full-range rows that reach further above 0.
    """
    lowest_R1 = rows_Rg.amin(1, keepdim=True).clamp(max=0)
    highest_R1 = rows_Rg.amax(1, keepdim=True).clamp(min=0)
    # AIMET widens a row that is (nearly) constant by one smallest step for each code.
    widen_R1 = SCALE_FLOOR * ((highest_R1 - lowest_R1) / spec.num_steps < SCALE_FLOOR)
    lowest_R1, highest_R1 = lowest_R1 + spec.qmin * widen_R1, highest_R1 + spec.qmax * widen_R1
    if not spec.symmetric:
        return lowest_R1, highest_R1
    if spec.full_range:
        step_R1 = torch.where(highest_R1 > -lowest_R1, highest_R1, lowest_R1) / spec.qmin
        return spec.qmin * step_R1, spec.qmax * step_R1
    # At 2 bits AIMET lets the positive end be clipped by one step: {-2, -1, 0, 1} would waste half of the range.
    positive_steps = spec.qmax if spec.bits > 2 else 2
    step_R1 = torch.maximum(highest_R1 / positive_steps, lowest_R1 / spec.qmin)
    return spec.qmin * step_R1, spec.qmax * step_R1


def scale_of(min_R1: Tensor, max_R1: Tensor, spec: QuantSpec, num_groups: int | None = None) -> Tensor:
    """Step of the grid between two ends, in weight units per code. Its sign is that of `max - min`.

    Rounded to what is kept (`kept_scale`), so that search, training and codes all see that step.

    Args:
        num_groups: neighbouring rows that are one output channel; a two-level grid needs it.
    """
    step_R1 = (max_R1 - min_R1) / spec.num_steps
    if spec.full_range:
        step_R1 = torch.where(step_R1 < 0, step_R1.clamp(max=-SCALE_FLOOR), step_R1.clamp(min=SCALE_FLOOR))
    else:
        step_R1 = step_R1.clamp(min=SCALE_FLOOR)
    return kept_scale(step_R1, spec, num_groups)


def kept_scale(scale_R1: Tensor, spec: QuantSpec, num_groups: int | None = None) -> Tensor:
    """The nearest scales that a grid can keep: whole multiples of a channel's, or values of `spec.scale_dtype`.

    Args:
        num_groups: as `scale_of`'s.
    """
    if spec.decompressed_bits:
        if num_groups is None:
            raise TypeError("a two-level grid needs the number of groups")
        multiplier_OG, channel_O1 = two_levels(scale_R1.reshape(-1, num_groups), spec)
        scale_R1 = (multiplier_OG * channel_O1).reshape(-1, 1)
    if spec.scale_dtype:
        scale_R1 = scale_R1.to(getattr(torch, spec.scale_dtype)).float()
    return scale_R1


def two_levels(scale_OG: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Whole multipliers [O, G], as float32, and channels' scales [O, 1] whose products are nearest to the scales.

    A channel's largest scale is `spec.max_multiplier` times the channel's own. Scales that are such products already,
    as float32 rounds them, are taken apart without a change to any bit.

    Source: low-power blockwise quantization, AIMET's `GroupedBlockQuantizeDequantize` with one block group a channel.
    """
    # Division by a power of two and multiplication by it are exact, so the largest scale stays what it is.
    channel_O1 = scale_OG.amax(1, keepdim=True) / spec.max_multiplier
    return (scale_OG / channel_O1).round().clamp(1, spec.max_multiplier), channel_O1


def zero_point_of(min_R1: Tensor, scale_R1: Tensor, spec: QuantSpec) -> Tensor:
    """Integer code that stands for 0 on an asymmetric grid; 0 on a symmetric one."""
    if spec.symmetric:
        return torch.zeros_like(scale_R1)
    return (spec.qmin - min_R1 / scale_R1).clamp(spec.qmin, spec.qmax).round()


def quantize(rows_Rg: Tensor, scale_R1: Tensor, zero_point_R1: Tensor, spec: QuantSpec) -> Tensor:
    """Codes of the nearest grid points (half to even), int8."""
    codes_Rg = (rows_Rg / scale_R1).round_().add_(zero_point_R1).clamp_(spec.qmin, spec.qmax)
    return codes_Rg.to(torch.int8)


def dequantize(codes_Rg: Tensor, scale_R1: Tensor, zero_point_R1: Tensor) -> Tensor:
    """Grid points of codes, float32."""
    return (codes_Rg.float() - zero_point_R1) * scale_R1
