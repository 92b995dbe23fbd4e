"""Dense packing of integer codes, any width from 2 to 8 bits."""

import torch
from torch import Tensor

from shardq.quant.grid import Grid

CODES_AT_ONCE = 1 << 20  # what a processor's cache holds
LANES = (8, 16, 32)  # bits: 8 codes lie in a word of 64 bits, first a byte each, at last one behind the other


def packed_width(num_codes: int, bits: int) -> int:
    """Bytes that one row of codes takes."""
    return -(-num_codes * bits // 8)


def pack(codes_OI: Tensor, grid: Grid) -> Tensor:
    """Pack codes [O, I] (int8) into bytes [O, ceil(I * bits / 8)] (uint8).

    Each row starts on a byte. A code is stored as `code - qmin`, little-endian: bit j of code i is bit
    `i * bits + j` of the row, and bit n of a row is bit `n % 8` of its byte `n // 8`.
    """
    num_codes = codes_OI.shape[1]
    num_words = -(-num_codes // 8)

    def pack_rows(rows: Tensor) -> Tensor:
        unsigned = rows.view(torch.uint8) - grid.qmin  # wraps around as it should
        words = torch.nn.functional.pad(unsigned, (0, -num_codes % 8)).flatten().view(torch.int64)
        for lane in LANES:  # the upper half of each pair of lanes moves down to where the lower one's codes end
            kept, moved = _halves(lane, grid.bits)
            words = (words & kept) | ((words >> (lane - lane // 8 * grid.bits)) & moved)
        by_word = words.view(torch.uint8).view(len(rows), num_words, 8)
        return by_word[:, :, : grid.bits].flatten(1)[:, : packed_width(num_codes, grid.bits)]

    return torch.cat([pack_rows(rows) for rows in _row_chunks(codes_OI, num_codes)])


def unpack(packed_OB: Tensor, num_inputs: int, grid: Grid) -> Tensor:
    """Codes [O, I] (int8) of bytes made by `pack`."""
    num_words = -(-num_inputs // 8)

    def unpack_rows(rows: Tensor) -> Tensor:
        by_word = torch.nn.functional.pad(rows, (0, num_words * grid.bits - rows.shape[1]))
        by_word = torch.nn.functional.pad(by_word.unflatten(1, (num_words, grid.bits)), (0, 8 - grid.bits))
        words = by_word.flatten().view(torch.int64)
        for lane in reversed(LANES):
            kept, moved = _halves(lane, grid.bits)
            shift = lane - lane // 8 * grid.bits
            words = (words & kept) | ((words & moved) << shift)
        return words.view(torch.int8).view(len(rows), -1)[:, :num_inputs] + grid.qmin  # wraps around as it should

    return torch.cat([unpack_rows(rows) for rows in _row_chunks(packed_OB, num_inputs)])


def pack_words(codes_RC: Tensor, grid: Grid) -> Tensor:
    """Pack as `pack`, each row filled up with zeros to int32 words [R, ceil(C * bits / 32)]."""
    packed_RB = pack(codes_RC, grid)
    filled_RB = torch.nn.functional.pad(packed_RB, (0, -packed_RB.shape[1] % 4))
    return filled_RB.flatten().view(torch.int32).view(len(codes_RC), -1)


def unpack_words(words_RW: Tensor, num_codes: int, grid: Grid) -> Tensor:
    """Codes [R, C] (int8) of words made by `pack_words`."""
    return unpack(words_RW.contiguous().view(torch.uint8), num_codes, grid)


def _halves(lane: int, bits: int) -> tuple[int, int]:
    """Masks of a 64-bit word, as signed: of the codes in the lower of two lanes, and of those that follow them."""
    width = lane // 8 * bits
    lower = sum(((1 << width) - 1) << start for start in range(0, 64, 2 * lane))
    upper = lower << width
    return lower - (lower >> 63 << 64), upper - (upper >> 63 << 64)


def _row_chunks(rows: Tensor, num_codes: int) -> tuple[Tensor, ...]:
    return rows.split(max(1, CODES_AT_ONCE // max(1, num_codes)))
