"""AWQ checkpoints, as AutoAWQ and AutoRound write them for matrix products (`gemm`).

Of a linear [O, I] with 4 bits: `qweight` int32 [I, O / 8], `qzeros` int32 [G, O / 8], `scales` [G, O]. A word holds
eight neighbouring output channels, not in order. (compressed-tensors' `converters/autoawq.py`.)
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from shardq.errors import CheckpointError, UnsupportedModelError
from shardq.formats.integers import grid_points
from shardq.formats.shards import Index, TensorInfo
from shardq.formats.source import Rows, SourceTensor
from shardq.quant import packing
from shardq.quant.integer_grid import IntegerGrid

GRID = IntegerGrid(bits=4, symmetric=False)
PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # in a word, of eight channels
MIDDLE = 8  # the zero point where none is stored


def encoded_tensors(index: Index, scheme: dict) -> Iterator[SourceTensor]:
    """The weights of an AWQ checkpoint, as `Decoder` gives them.

    Args:
        scheme: config.json's scheme.

    Raises:
        CheckpointError: tensors are missing or do not fit together.
        UnsupportedModelError: other widths, or another packing.
    """
    bits, version = scheme.get("bits", scheme.get("w_bit", 4)), str(scheme.get("version", "gemm")).lower()
    if bits != 4 or version != "gemm":
        raise UnsupportedModelError(
            f"awq: {bits} bits packed as {version} cannot be read, only 4 bits as gemm; pass the checkpoint it was "
            "made from"
        )
    for name in [name.removesuffix(".qweight") for name in index if name.endswith(".qweight")]:
        words, zeros, scales = (index.get(f"{name}.{part}") for part in ("qweight", "qzeros", "scales"))
        if words is None or scales is None or (zeros is None and scheme.get("zero_point", True)):
            raise CheckpointError(f"{index[f'{name}.qweight'].file}: {name} lacks a tensor of qzeros and scales")
        yield _encoded(name, words, zeros, scales)


def _encoded(name: str, words: TensorInfo, zeros: TensorInfo | None, scales: TensorInfo) -> SourceTensor:
    parts = (words, scales) if zeros is None else (words, scales, zeros)
    if any(len(part.shape) != 2 or 0 in part.shape for part in parts):
        raise CheckpointError(f"{words.file}: qweight, qzeros and scales of {name} are not matrices")
    (num_groups, num_outputs), num_inputs = scales.shape, words.shape[0]
    of_zeros = (num_groups, words.shape[1]) if zeros is None else zeros.shape
    if num_inputs % num_groups or (num_groups, num_outputs // 8) != of_zeros or words.shape[1] * 8 != num_outputs:
        raise CheckpointError(f"{words.file}: qweight, qzeros and scales of {name} do not fit together")

    def decode(read: Callable[[TensorInfo, Rows], Tensor], rows: Rows) -> Tensor:
        def codes(info: TensorInfo) -> Tensor:
            in_places = packing.unpack_words(read(info, None), num_outputs, GRID)
            return in_places.unflatten(1, (-1, 8))[:, :, PLACES].flatten(1).T

        scale_OG = read(scales, None).T
        zero_OG = torch.full(scale_OG.shape, MIDDLE + GRID.qmin) if zeros is None else codes(zeros)
        values_OI = grid_points(f"{words.file}: {name}", codes(words), scale_OG, zero_OG, None)
        return values_OI if rows is None else values_OI[rows]

    return SourceTensor(f"{name}.weight", scales.dtype, (num_outputs, num_inputs), parts, decode)
