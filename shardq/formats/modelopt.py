"""Checkpoints of NVIDIA's ModelOpt: linears in FP8, or in NVFP4 with a second scale for the whole weight.

`NAME.weight` float8 [O, I] times `NAME.weight_scale`, one number; or uint8 [O, I / 2], two E2M1 floats a byte, the
lower first, times float8 `NAME.weight_scale` [O, I / 16] and float32 `NAME.weight_scale_2`, one number. (ModelOpt's
`nvfp4_tensor.py`; its layout is that of compressed-tensors with the inverse of the second scale.)
"""

from collections.abc import Iterator

from shardq.errors import CheckpointError, UnsupportedModelError
from shardq.formats.floats import FLOAT8, block_scaled
from shardq.formats.shards import Index
from shardq.formats.source import SourceTensor

READ = ("FP8", "NVFP4")
NVFP4_BLOCKS = [(1, 16)]
OF_ACTIVATIONS = ("input_scale", "k_scale", "v_scale")  # how programs round what enters and leaves a linear


def encoded_tensors(index: Index, scheme: dict) -> Iterator[SourceTensor]:
    """The weights of a ModelOpt checkpoint, as `Decoder` gives them.

    Args:
        scheme: config.json's scheme.

    Raises:
        CheckpointError: scales are missing, or do not fit.
        UnsupportedModelError: weights are of another kind.
    """
    if scheme.get("quant_algo") not in READ:
        raise UnsupportedModelError(
            f"modelopt: quant_algo {scheme.get('quant_algo')} cannot be read, only {' and '.join(READ)}; pass the "
            "checkpoint it was made from"
        )
    for name in [name.removesuffix("_scale") for name in index if name.endswith(".weight_scale")]:
        codes, scale, factor = index.get(name), index[f"{name}_scale"], index.get(f"{name}_scale_2")
        around = name.removesuffix("weight")
        if codes is None or codes.dtype not in ("U8", *FLOAT8) or (codes.dtype == "U8") != (factor is not None):
            raise CheckpointError(f"{scale.file}: {name} has a scale, but not its codes, or not all scales")
        unused = [index[f"{around}{part}"] for part in OF_ACTIVATIONS if f"{around}{part}" in index]
        yield block_scaled(name, codes, scale, NVFP4_BLOCKS if codes.dtype == "U8" else (), unused, factor=factor)
