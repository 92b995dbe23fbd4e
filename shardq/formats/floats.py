"""Weights of 8-bit and 4-bit floats with a scale a block: what the formats that store them share."""

from collections.abc import Callable, Iterable
from math import prod

import torch
from torch import Tensor

from shardq.errors import CheckpointError
from shardq.formats.shards import DTYPES, TensorInfo
from shardq.formats.source import Rows, SourceTensor

FLOAT8 = ("F8_E4M3", "F8_E5M2")
FP4_PAIRS = ("U8", "I8")  # dtypes of bytes that hold two 4-bit floats
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
E8M0_BIAS = 127
ROWS_AT_ONCE = 128

Block = tuple[int, int]  # rows and columns that have one scale


def code_values(codes: Tensor) -> Tensor:
    """The numbers that codes stand for, in float32: of float8, or of bytes [..., W] two E2M1 each, the lower first."""
    numbers = codes.reshape(-1).view(torch.uint8).int()
    # Taken from a table of all codes, one element each: several times as fast as torch's own conversion of float8.
    if codes.is_floating_point():
        table = torch.arange(256, dtype=torch.uint8).view(codes.dtype).float()
        return table.index_select(0, numbers).view(codes.shape)
    pairs = torch.tensor([(FP4_VALUES[byte % 16], FP4_VALUES[byte // 16]) for byte in range(256)])
    return pairs.view(torch.int64).flatten().index_select(0, numbers).view(torch.float32).view(*codes.shape[:-1], -1)


def scale_values(scale: Tensor) -> Tensor:
    """Scales in float32; a byte holds an exponent, as E8M0 does: 2^(byte - 127)."""
    return torch.exp2(scale.float() - E8M0_BIAS) if scale.dtype == torch.uint8 else scale.float()


def scaled(
    codes_RW: Tensor, scale_GH: Tensor, block: Block, row_numbers: Tensor, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """The weight [R, C], each product rounded once from float32.

    Args:
        codes_RW: of the rows of these numbers in the whole weight.
        scale_GH: scales of the whole weight's blocks, float32; the last block of a row or column may be cut.
    """
    parts = []
    for codes, numbers in zip(codes_RW.split(ROWS_AT_ONCE), row_numbers.split(ROWS_AT_ONCE), strict=True):
        values_RC, scale_RH = code_values(codes), scale_GH[numbers // block[0]]
        num_whole = values_RC.shape[1] // block[1]
        whole_RHB = values_RC[:, : num_whole * block[1]].unflatten(1, (num_whole, block[1]))
        whole_RHB.mul_(scale_RH[:, :num_whole, None])
        values_RC[:, num_whole * block[1] :].mul_(scale_RH[:, num_whole:])  # a cut block, or none
        parts.append(values_RC.to(dtype))
    return torch.cat(parts)


def block_scaled(
    name: str,
    codes: TensorInfo,
    scale: TensorInfo,
    asked: Iterable[Block] = (),
    more: Iterable[TensorInfo] = (),
    divisor: TensorInfo | None = None,
    factor: TensorInfo | None = None,
) -> SourceTensor:
    """A weight [O, I], or [E, O, I] of experts, of float8 or FP4 codes with scales: bfloat16, or float16 as its scales.

    Args:
        asked: sizes of a block that config.json gives, the first that fits; else there is one scale for the whole, one
            a row, or one a column.
        more: further stored tensors that belong to the weight.
        divisor, factor: of all scales, one number each.

    Raises:
        CheckpointError: the scales' shape is not that of the weight's blocks.
    """
    width = codes.shape[-1] * (2 if codes.dtype in FP4_PAIRS else 1) if codes.shape else 0
    shape = (*codes.shape[:-1], width)
    fitting = _grid(shape, scale.shape, asked)
    if fitting is None:
        sizes = " or ".join(str(list(size)) for size in asked)
        raise CheckpointError(
            f"{codes.file}: {scale.name} {list(scale.shape)} has not the scales of {name} {list(shape)}"
            f"{f' in blocks of {sizes}' if sizes else ''}; download it again"
        )
    grid, block = fitting
    dtype = "F16" if scale.dtype == "F16" else "BF16"

    def decode(read: Callable[[TensorInfo, Rows], Tensor], rows: Rows) -> Tensor:
        # Of experts, those of the rows: nothing is read of the others.
        scales = scale_values(read(scale, rows if len(shape) > 2 else None)).view(-1, *grid[-2:])
        if divisor is not None:
            scales = scales / read(divisor, None).float().reshape(())
        if factor is not None:
            scales = scales * read(factor, None).float().reshape(())
        held, numbers = read(codes, rows), torch.arange(shape[-2])
        if len(shape) == 2:
            numbers = numbers if rows is None else torch.tensor(rows, dtype=torch.int64)
            return scaled(held, scales[0], block, numbers, DTYPES[dtype])
        values = torch.empty(len(held), *shape[1:], dtype=DTYPES[dtype])
        for place, (codes_RW, scale_GH) in enumerate(zip(held, scales, strict=True)):
            values[place] = scaled(codes_RW, scale_GH, block, numbers, DTYPES[dtype])
        return values

    stored = tuple(info for info in (codes, scale, divisor, factor, *more) if info)
    return SourceTensor(name, dtype, shape, stored, decode)


def _grid(
    shape: tuple[int, ...], scale: tuple[int, ...], asked: Iterable[Block]
) -> tuple[tuple[int, ...], Block] | None:
    """The shape of the scales with one entry a dimension of the weight, and the size of a block; None: no fit."""
    if len(shape) not in (2, 3) or 0 in shape:
        return None
    lead, (num_rows, num_columns) = shape[:-2], shape[-2:]
    for block in (*asked, (num_rows, num_columns), (1, num_columns), (num_rows, 1)):
        grid = (*lead, -(-num_rows // block[0]), -(-num_columns // block[1]))
        # Formats leave out last dimensions of one, and store a single scale in any shape.
        forms = [grid[:length] for length in range(len(lead), len(grid) + 1) if prod(grid[length:]) == 1]
        if scale in forms or (not lead and prod(scale) == prod(grid) == 1):
            return grid, block
    return None
