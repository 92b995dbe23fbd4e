"""Some of a tensor's values as a tensor of the source, such as one expert of a fused weight, read without the rest."""

import math
from dataclasses import replace

from torch import Tensor

from shardq.formats.shards import TensorInfo
from shardq.formats.source import Read, Rows, SourceTensor


def range_of(tensor: SourceTensor, start: int, end: int) -> SourceTensor:
    """Some values [end - start] of a tensor that follow each other; no more than needed is read.

    What is read of a stored tensor counts as a stored one, `NAME[START:END]`, whose digest is taken and compared like
    any other's: that of the whole would ask for a pass over all experts wherever one is read.
    """
    size = math.prod(tensor.shape[1:])
    first, last = start // size, -(-end // size)
    # A matrix may be encoded in blocks of several rows; of a fused tensor each expert is encoded by itself.
    are_rows = len(tensor.shape) > 2 and all(info.shape[:1] == tensor.shape[:1] for info in tensor.stored)
    if tensor.decode is None:
        first, parts = 0, [_stored_range(tensor.stored[0], start, end)]
    elif are_rows:
        sizes = [math.prod(info.shape[1:]) for info in tensor.stored]
        parts = [_stored_range(info, first * n, last * n) for info, n in zip(tensor.stored, sizes, strict=True)]
    else:
        first, parts = 0, list(tensor.stored)
    part_of = {info.name: part for info, part in zip(tensor.stored, parts, strict=True)}

    def decode(read: Read, rows: Rows) -> Tensor:
        def read_part(info: TensorInfo, wanted: Rows) -> Tensor:
            part = part_of[info.name]
            if part is info:
                return read(info, wanted)
            values = read(part, None).reshape(-1, *info.shape[1:])
            return values if wanted is None else values[[row - first for row in wanted]]

        if tensor.decode is None:
            values = read(parts[0], None).flatten()
        else:
            values = tensor.decode(read_part, list(range(first, last)) if are_rows else None).flatten()
            values = values[start - first * size : end - first * size]
        return values if rows is None else values[rows]

    name = f"{tensor.name}[{start}:{end}]"
    return SourceTensor(name, tensor.dtype, (end - start,), tuple(parts), decode)


def _stored_range(info: TensorInfo, start: int, end: int) -> TensorInfo:
    """Some values of a stored tensor as a stored tensor, or that itself if they are all."""
    if (start, end) == (0, math.prod(info.shape)):
        return info
    size = info.num_bytes // math.prod(info.shape)
    return replace(
        info,
        name=f"{info.name}[{start}:{end}]",
        shape=(end - start,),
        offset=info.offset + start * size,
        num_bytes=(end - start) * size,
    )
