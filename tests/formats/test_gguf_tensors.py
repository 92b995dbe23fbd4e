"""Blocks of GGUF, read back by the package gguf."""

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as BlockType

import tiny
from shardq.errors import ConfigError, QuantizationError
from shardq.formats import gguf_tensors
from shardq.quant.integer_grid import IntegerGrid

OUTPUTS, INPUTS = 6, 128
GRIDS = {
    IntegerGrid(bits=4, group_size=32): BlockType.Q4_0,
    IntegerGrid(bits=4): BlockType.Q4_0,
    IntegerGrid(bits=4, full_range=True, group_size=64): BlockType.Q4_0,
    IntegerGrid(bits=2, full_range=True): BlockType.Q4_0,
    IntegerGrid(bits=4, symmetric=False, group_size=32): BlockType.Q4_1,
    IntegerGrid(bits=3, symmetric=False): BlockType.Q4_1,
    IntegerGrid(bits=8, group_size=32): BlockType.Q8_0,
    IntegerGrid(bits=5, full_range=True): BlockType.Q8_0,
}


@pytest.mark.parametrize(("grid", "kind"), GRIDS.items(), ids=str)
def test_the_package_reads_the_run_s_weights(grid: IntegerGrid, kind: BlockType):
    assert gguf_tensors.block_type(grid) == kind
    linear = tiny.random_linear(grid, (OUTPUTS, INPUTS), torch.float16)
    packed = gguf_tensors.pack("a", linear)
    assert packed.nbytes == gguf_tensors.num_bytes((OUTPUTS, INPUTS), kind)
    found = torch.from_numpy(gguf.quants.dequantize(packed.numpy(), kind))
    exact = linear.dequantized()
    if grid.symmetric:
        assert torch.equal(found, exact)
        assert gguf_tensors.largest_change(packed, linear) == 0
    else:  # the offset, of up to 15 steps, is rounded to float16
        step = linear.scale_OG.repeat_interleave(INPUTS // linear.scale_OG.shape[1], 1)
        assert ((found - exact).abs() <= 15 * 2**-11 * step).all() and not torch.equal(found, exact)


@pytest.mark.parametrize("grid", [IntegerGrid(bits=4, group_size=32), IntegerGrid(bits=8)], ids=str)
def test_the_change_by_rounding_scales_is_the_scales(grid: IntegerGrid):
    linear = tiny.random_linear(grid, (OUTPUTS, INPUTS))
    expected = (linear.scale_OG.half().double() / linear.scale_OG.double() - 1).abs().max().item()
    assert gguf_tensors.largest_change(gguf_tensors.pack("a", linear), linear) == pytest.approx(expected, rel=1e-3)
    assert 0 < expected < 2**-11


@pytest.mark.parametrize("scale", [1e-9, 1e6])
def test_scales_beyond_float16_are_refused(scale: float):
    linear = tiny.random_linear(IntegerGrid(bits=4), (OUTPUTS, INPUTS), torch.float16)
    linear.scale_OG[2] = scale
    with pytest.raises(QuantizationError, match="a scale of blocks.0.q is too large or too small for float16"):
        gguf_tensors.pack("blocks.0.q", linear)


def test_grids_that_fit_no_block_are_refused():
    with pytest.raises(ConfigError, match="groups of 16"):
        gguf_tensors.block_type(IntegerGrid(bits=4, group_size=16))
    with pytest.raises(ConfigError, match="asymmetric grids of 5 bits"):
        gguf_tensors.block_type(IntegerGrid(bits=5, symmetric=False))
    with pytest.raises(ConfigError, match="q_proj has 80 input channels"):
        gguf_tensors.check_width("q_proj", 80)


def test_rows_are_where_llama_cpp_rotates_them():
    num_heads, head_dim = 3, 8
    rows = torch.arange(num_heads * head_dim).unsqueeze(1)
    moved = gguf_tensors.rows_for_rope(rows, num_heads).view(num_heads, head_dim)
    for head in range(num_heads):
        for pair in range(head_dim // 2):
            first, second = moved[head, 2 * pair], moved[head, 2 * pair + 1]
            assert (first, second) == (head * head_dim + pair, head * head_dim + pair + head_dim // 2)
