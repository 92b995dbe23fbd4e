"""Dense packing of integer codes, any width from 2 to 8 bits."""

import torch
from torch import Tensor

from shardq.quant.spec import QuantSpec

ROWS_AT_ONCE_ELEMENTS = 1 << 22  # bounds the temporary bit planes to a few tens of MiB


def packed_width(num_codes: int, bits: int) -> int:
    """Bytes that one row of codes takes."""
    return -(-num_codes * bits // 8)


def pack(codes_OI: Tensor, spec: QuantSpec) -> Tensor:
    """Pack signed codes [O, I] (int8) into bytes [O, ceil(I * bits / 8)] (uint8).

    Each row starts on a byte. A code is stored as `code - qmin`, little-endian: bit j of code i is bit
    `i * bits + j` of the row, and bit n of a row is bit `n % 8` of its byte `n // 8`.
    """
    shifts = torch.arange(spec.bits, dtype=torch.uint8, device=codes_OI.device)
    weights = 1 << torch.arange(8, dtype=torch.uint8, device=codes_OI.device)

    def pack_rows(rows: Tensor) -> Tensor:
        unsigned = (rows.to(torch.int16) - spec.qmin).to(torch.uint8)
        bits = ((unsigned[:, :, None] >> shifts) & 1).flatten(1)
        bits = torch.nn.functional.pad(bits, (0, -bits.shape[1] % 8))
        return (bits.unflatten(1, (-1, 8)) * weights).sum(2, dtype=torch.uint8)

    return torch.cat([pack_rows(rows) for rows in _row_chunks(codes_OI, codes_OI.shape[1])])


def unpack(packed_OB: Tensor, num_inputs: int, spec: QuantSpec) -> Tensor:
    """Codes [O, I] (int8) of bytes made by `pack`."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed_OB.device)
    weights = 1 << torch.arange(spec.bits, dtype=torch.int16, device=packed_OB.device)

    def unpack_rows(rows: Tensor) -> Tensor:
        bits = ((rows[:, :, None] >> shifts) & 1).flatten(1)[:, : num_inputs * spec.bits]
        unsigned = (bits.unflatten(1, (num_inputs, spec.bits)) * weights).sum(2, dtype=torch.int16)
        return (unsigned + spec.qmin).to(torch.int8)

    return torch.cat([unpack_rows(rows) for rows in _row_chunks(packed_OB, num_inputs)])


def _row_chunks(rows: Tensor, num_codes: int) -> tuple[Tensor, ...]:
    return rows.split(max(1, ROWS_AT_ONCE_ELEMENTS // max(1, num_codes)))
