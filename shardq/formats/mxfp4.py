"""Checkpoints whose experts are MXFP4, as gpt-oss is published.

`NAME_blocks` uint8 [E, R, C / 32, 16] holds two E2M1 floats a byte, the lower first, and `NAME_scales` uint8
[E, R, C / 32] an exponent a block, 2^(byte - 127). `NAME` is their product with the last two dimensions exchanged,
[E, C, R], which bfloat16 holds exactly. (transformers' `mxfp4.py`.)
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from shardq.errors import CheckpointError
from shardq.formats.floats import code_values, scale_values
from shardq.formats.shards import Index, TensorInfo
from shardq.formats.source import Rows, SourceTensor

BLOCK_BYTES = 16


def encoded_tensors(index: Index, scheme: dict) -> Iterator[SourceTensor]:
    """The weights of experts of an MXFP4 checkpoint, as `Decoder` gives them.

    Args:
        scheme: config.json's scheme, which says nothing more.

    Raises:
        CheckpointError: tensors are missing or do not fit together.
    """
    for name in [name.removesuffix("_blocks") for name in index if name.endswith("_blocks")]:
        blocks, scales = index[f"{name}_blocks"], index.get(f"{name}_scales")
        if scales is None:
            raise CheckpointError(f"{blocks.file}: {name} lacks its scales; download it again")
        is_known = {blocks.dtype, scales.dtype} == {"U8"} and len(blocks.shape) == 4 and blocks.shape[3] == BLOCK_BYTES
        if not is_known or scales.shape != blocks.shape[:3]:
            raise CheckpointError(f"{blocks.file}: blocks and scales of {name} do not fit together; download it again")
        yield _encoded(name, blocks, scales)


def _encoded(name: str, blocks: TensorInfo, scales: TensorInfo) -> SourceTensor:
    num_experts, num_rows, num_blocks, _ = blocks.shape
    shape = (num_experts, num_blocks * 2 * BLOCK_BYTES, num_rows)

    def decode(read: Callable[[TensorInfo, Rows], Tensor], rows: Rows) -> Tensor:
        codes, scale = read(blocks, rows), read(scales, rows)
        values = torch.empty(len(codes), *shape[1:], dtype=torch.bfloat16)
        for place, (codes_RGB, scale_RG) in enumerate(zip(codes, scale, strict=True)):
            values_RGC = code_values(codes_RGB) * scale_values(scale_RG)[:, :, None]
            values[place] = values_RGC.flatten(1).T
        return values

    return SourceTensor(name, "BF16", shape, (blocks, scales), decode)
