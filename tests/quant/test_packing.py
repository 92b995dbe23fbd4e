"""Dense packing of codes, against one big integer a row and against numpy's bit packing."""

import numpy as np
import pytest
import torch
from torch import Tensor

from shardq.quant import packing
from shardq.quant.integer_grid import IntegerGrid

WIDTHS = range(2, 9)


def random_codes(num_rows: int, num_codes: int, bits: int) -> Tensor:
    """Codes over the whole range, both ends among them."""
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (num_rows, num_codes), dtype=torch.int8)
    codes[0, 0], codes[-1, -1] = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    return codes


def packed_by_hand(row: list[int], bits: int) -> list[int]:
    """Bytes of the one integer whose bits are the unsigned codes, the first code lowest."""
    number = sum((code + 2 ** (bits - 1)) << (position * bits) for position, code in enumerate(row))
    return list(number.to_bytes((len(row) * bits + 7) // 8, "little"))


@pytest.mark.parametrize("num_codes", [1, 2, 3, 5, 7, 8, 13, 64, 129])
@pytest.mark.parametrize("bits", WIDTHS)
def test_packed_bytes_are_those_of_one_big_integer(bits: int, num_codes: int):
    codes = random_codes(4, num_codes, bits)
    packed = packing.pack(codes, IntegerGrid(bits=bits))
    assert packed.dtype == torch.uint8
    assert packed.tolist() == [packed_by_hand(row, bits) for row in codes.tolist()]


@pytest.mark.parametrize("num_codes", [1, 2, 3, 5, 7, 8, 13, 64, 129])
@pytest.mark.parametrize("bits", WIDTHS)
def test_unpacked_codes_are_those_that_were_packed_by_hand(bits: int, num_codes: int):
    codes = random_codes(4, num_codes, bits)
    packed = torch.tensor([packed_by_hand(row, bits) for row in codes.tolist()], dtype=torch.uint8)
    unpacked = packing.unpack(packed, num_codes, IntegerGrid(bits=bits))
    assert unpacked.dtype == torch.int8
    assert torch.equal(unpacked, codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_every_code_survives_the_round_trip(bits: int):
    codes = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1), dtype=torch.int8)[None]
    grid = IntegerGrid(bits=bits)
    assert torch.equal(packing.unpack(packing.pack(codes, grid), codes.shape[1], grid), codes)


@pytest.mark.parametrize("num_codes", [1, 3, 8, 11])
@pytest.mark.parametrize("bits", WIDTHS)
def test_width_of_a_row_is_its_bits_in_whole_bytes(bits: int, num_codes: int):
    assert packing.packed_width(num_codes, bits) == len(packed_by_hand([0] * num_codes, bits))


def packed_by_numpy(codes: Tensor, bits: int) -> np.ndarray:
    """numpy counts bits as we do where told `little`."""
    unsigned = (codes.numpy().astype(np.int16) + 2 ** (bits - 1)).astype(np.uint8)
    planes = np.unpackbits(unsigned[:, :, None], axis=2, count=bits, bitorder="little")
    return np.packbits(planes.reshape(len(unsigned), -1), axis=1, bitorder="little")


# More codes than are packed at once (1 Mi): many short rows, few long ones, and rows longer than a whole chunk.
@pytest.mark.parametrize("shape", [(150_001, 31), (5, 1_000_001), (2, 4_200_001)], ids=str)
@pytest.mark.parametrize("bits", [3, 4])
def test_weights_of_several_chunks_are_packed_as_one(bits: int, shape: tuple[int, int]):
    assert shape[0] * shape[1] > packing.CODES_AT_ONCE
    codes, grid = random_codes(*shape, bits), IntegerGrid(bits=bits)
    packed = packing.pack(codes, grid)
    assert np.array_equal(packed.numpy(), packed_by_numpy(codes, bits))
    assert torch.equal(packing.unpack(packed, shape[1], grid), codes)
