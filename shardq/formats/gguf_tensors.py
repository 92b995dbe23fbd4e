"""GGUF's block types Q4_0, Q4_1 and Q8_0: a linear's codes, 32 neighbouring input channels a block.

A block holds float16 numbers and then its codes, q: `d * (q - 8)` in Q4_0, `d * q + m` in Q4_1 (both q unsigned, two a
byte, channel i in the low half beside channel i + 16), `d * q` in Q8_0 (signed). A scale of a larger group, or of a
whole channel, is written once a block. (ggml, `ggml-common.h`; `gguf.quants` of the package gguf.)
"""

import math

import gguf
import torch
from gguf import GGMLQuantizationType as BlockType
from torch import Tensor

from shardq.errors import ConfigError, QuantizationError
from shardq.formats.integers import integer_grid
from shardq.quant.grid import Grid
from shardq.quant.quantized import QuantizedLinear

BLOCK = 32


def block_type(grid: Grid) -> BlockType:
    """The block type that holds a grid.

    Raises:
        ConfigError: none does.
    """
    symmetric = integer_grid("gguf", grid).symmetric
    if grid.group_size and grid.group_size % BLOCK:
        raise ConfigError(
            f"gguf: groups of {grid.group_size} do not fit its blocks of {BLOCK} channels; choose a multiple, or -1"
        )
    if not symmetric and grid.bits > 4:
        raise ConfigError(f"gguf: asymmetric grids of {grid.bits} bits have no block type, only of up to 4; export hf")
    if symmetric:
        return BlockType.Q4_0 if grid.bits <= 4 else BlockType.Q8_0
    return BlockType.Q4_1


def check_width(name: str, num_inputs: int) -> None:
    """Check that a linear's input channels are whole blocks.

    Raises:
        ConfigError: they are not.
    """
    if num_inputs % BLOCK:
        raise ConfigError(
            f"gguf: {name} has {num_inputs} input channels, no multiple of {BLOCK}; leave it as it is with "
            "--quant.ignore, or export hf"
        )


def num_bytes(shape: tuple[int, ...], kind: BlockType) -> int:
    """Bytes of a tensor of whole blocks."""
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    return math.prod(shape) // block_size * block_bytes


def pack(name: str, linear: QuantizedLinear) -> Tensor:
    """A linear's weight as rows of blocks, uint8.

    Raises:
        QuantizationError: a scale is too large or too small for float16.
    """
    grid, (num_outputs, num_inputs) = linear.grid, linear.codes_OI.shape
    kind, num_blocks = block_type(grid), num_inputs // BLOCK
    scale_OB = linear.scale_OG.repeat_interleave(num_blocks // linear.scale_OG.shape[1], 1)
    numbers = [scale_OB.half()]
    if not (numbers[0].isfinite() & (numbers[0] != 0)).all():
        raise QuantizationError(f"gguf: a scale of {name} is too large or too small for float16; export hf instead")
    if kind == BlockType.Q4_1:
        zero_OB = linear.zero_point_OG.repeat_interleave(num_blocks // linear.scale_OG.shape[1], 1)
        numbers.append(((grid.qmin - zero_OB) * scale_OB).half())
        if not numbers[1].isfinite().all():
            raise QuantizationError(f"gguf: an offset of {name} is too large for float16; export hf instead")
    codes_OBb = linear.codes_OI.view(num_outputs, num_blocks, BLOCK)
    if kind != BlockType.Q8_0:
        unsigned = codes_OBb - (-8 if kind == BlockType.Q4_0 else grid.qmin)
        codes_OBb = unsigned[..., : BLOCK // 2] | unsigned[..., BLOCK // 2 :] << 4
    parts = [*(number.unsqueeze(2).view(torch.uint8) for number in numbers), codes_OBb.contiguous().view(torch.uint8)]
    return torch.cat(parts, 2).flatten(1)


def unpack(packed_OX: Tensor, kind: BlockType) -> Tensor:
    """The weight [O, I], float32, that rows of blocks stand for, as every reader of the format takes it."""
    return torch.from_numpy(gguf.quants.dequantize(packed_OX.numpy(), kind))


def largest_change(packed_OX: Tensor, linear: QuantizedLinear) -> float:
    """Largest change of a weight by the rounding to float16, relative to the largest weight of its block."""
    exact = linear.dequantized().view(-1, BLOCK)
    changed = (unpack(packed_OX, block_type(linear.grid)).view(-1, BLOCK) - exact).abs().amax(1)
    return (changed / exact.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny)).max().item()


def rows_for_rope(tensor: Tensor, num_heads: int) -> Tensor:
    """Rows of a query or key projection in the order in which GGUF's Llama rotates them.

    Transformers rotates channel i of a head together with channel i + d/2, llama.cpp channel 2i with 2i + 1.
    """
    paired = tensor.unflatten(0, (num_heads, 2, -1))
    return paired.transpose(1, 2).flatten(0, 2)
