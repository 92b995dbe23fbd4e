"""Checkpoints in FP8 as DeepSeek, Qwen, GLM, Mistral and others publish them, and as transformers writes them.

`NAME` float8 [O, I] has its scales in `NAME_scale_inv`, by which it is multiplied for all its name: one a block of
`weight_block_size`, whose last may be cut, one a row, or one for all. Older and other programs name them otherwise.
Scales are floats, or E8M0 exponents of their own dtype or as bytes. Experts may be fused, [E, O, I], or FP4, two a
byte in blocks of 32. (transformers' `finegrained_fp8.py`.)
"""

from collections.abc import Iterator

from shardq.errors import CheckpointError, UnsupportedModelError
from shardq.formats.floats import FLOAT8, FP4_PAIRS, Block, block_scaled
from shardq.formats.shards import Index
from shardq.formats.source import SourceTensor

# What follows `NAME`, or stands in place of its last part `weight`, in the name of its scales.
AFTER_NAME = ("_scale_inv", "_scale")
FOR_WEIGHT = ("scale", "qscale_weight")
FP4_BLOCKS = [(1, 32)]
OF_INPUTS = ("activation_scale", "input_scale", "input_scale_ub", "qscale_act")  # in the same place


def encoded_tensors(index: Index, scheme: dict) -> Iterator[SourceTensor]:
    """The weights of an FP8 checkpoint, as `Decoder` gives them.

    Args:
        scheme: config.json's scheme.

    Raises:
        CheckpointError: scales are missing, or do not fit.
        UnsupportedModelError: other floats than E4M3, or scales of a kind that is not known.
    """
    asked = _block_sizes(scheme)
    for name, codes in index.items():
        if codes.dtype not in (*FLOAT8, *FP4_PAIRS):
            continue
        around = name.removesuffix("weight")
        places = [f"{name}{suffix}" for suffix in AFTER_NAME]
        places += [f"{around}{part}" for part in FOR_WEIGHT if around != name]
        scale = next((index[place] for place in places if place in index), None)
        if scale is not None:
            inputs = [f"{around}{part}" for part in OF_INPUTS] + [f"{name}_{part}" for part in OF_INPUTS]
            blocks = asked if codes.dtype in FLOAT8 else FP4_BLOCKS
            yield block_scaled(name, codes, scale, blocks, [index[place] for place in inputs if place in index])
        elif codes.dtype in FLOAT8:
            raise CheckpointError(f"{codes.file}: tensor {name} is float8, but has no scales; download it again")


def _block_sizes(scheme: dict) -> list[Block]:
    """The size of a block, where config.json gives one."""
    checks = {
        "fmt": scheme.get("fmt") in (None, "e4m3"),
        "scale_fmt": scheme.get("scale_fmt") in (None, "float", "ue8m0"),
        "expert_dtype": scheme.get("expert_dtype") in (None, "fp8", "fp4"),
    }
    size = scheme.get("weight_block_size")
    is_pair = isinstance(size, list) and len(size) == 2
    checks["weight_block_size"] = size is None or is_pair and all(isinstance(one, int) and one > 0 for one in size)
    for key, is_known in checks.items():
        if not is_known:
            raise UnsupportedModelError(f"fp8: {key} {scheme[key]} of config.json is not known, so it cannot be read")
    return [(size[0], size[1])] if size else []
