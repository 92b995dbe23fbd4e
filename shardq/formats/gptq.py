"""GPTQ checkpoints, which vLLM, and transformers with GPTQModel, load: tensors of a quantized linear, and the config.

`qweight` int32 [I * bits / 32, O] and `qzeros` int32 [G, O * bits / 32] hold unsigned codes and zero points, densely,
the first in the lowest bits, along the input and the output channels; `scales` [G, O]; `g_idx` int32 [I] is the group
of each input channel. A weight is `(code - zero_point) * scale`. Version 1 (`checkpoint_format` "gptq") stores each
zero point less one, which a zero point of 0 does not survive in every reader: it is kept for symmetric grids, which
all programs read, full-range ones with negative scales among them, as AutoRound writes them (its `data_type/int.py`);
asymmetric grids are version 2, which stores zero points as they are. (AutoGPTQ's `qlinear_cuda.py`, GPTQModel's
`utils/model.py`.)
"""

import re
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from shardq import __version__
from shardq.errors import CheckpointError, ConfigError, UnsupportedModelError
from shardq.formats.integers import grid_points, integer_grid
from shardq.formats.shards import Index, TensorInfo
from shardq.formats.source import Rows, SourceTensor
from shardq.quant import packing
from shardq.quant.grid import Grid
from shardq.quant.integer_grid import IntegerGrid
from shardq.quant.quantized import QuantizedLinear

BITS = (2, 3, 4, 8)
# Linears that vLLM makes one of, and gives one scheme.
VLLM_FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
    "in_proj_qkvz": ("in_proj_qkv", "in_proj_z"),
    "in_proj_ba": ("in_proj_b", "in_proj_a"),
}
WORD_CODES = 32  # of channels a multiple: then a row of codes of any width fills whole words


def check_grid(grid: Grid) -> None:
    """Check that the format can express a grid.

    Raises:
        ConfigError: it cannot.
    """
    if integer_grid("gptq", grid).bits not in BITS:
        raise ConfigError(f"gptq: {grid.bits} bits are not supported, only 2, 3, 4 and 8; export hf instead")


def check_shape(name: str, num_outputs: int, num_inputs: int) -> None:
    """Check that the format can hold a linear of some size.

    Raises:
        ConfigError: it cannot; names the linear.
    """
    for size, kind in ((num_inputs, "input"), (num_outputs, "output")):
        if size % WORD_CODES:
            raise ConfigError(
                f"gptq: {name} has {size} {kind} channels, the format needs a multiple of {WORD_CODES}; leave it as it "
                "is with --quant.ignore"
            )


def is_served_by_vllm(grid: Grid) -> bool:
    """Whether vLLM (0.32) takes a GPTQ checkpoint of a grid: it reads no zero points."""
    return isinstance(grid, IntegerGrid) and grid.bits in (4, 8) and grid.symmetric


def linear_tensors(name: str, linear: QuantizedLinear, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors, by full name, that a linear's weight becomes.

    Args:
        name: of the linear.
        dtype: that scales are stored in, the model's: programs would round them to it as they load.

    Raises:
        ConfigError: as `check_shape`.
    """
    num_outputs, num_inputs = linear.codes_OI.shape
    check_shape(name, num_outputs, num_inputs)
    zero_point_GO = linear.zero_point_OG.T.to(torch.int8)
    # One less may be below the smallest code, but not on a symmetric grid, where zero points are 0.
    stored_GO = zero_point_GO if linear.grid.has_zero_point else zero_point_GO - 1
    return {
        f"{name}.qweight": packing.pack_words(linear.codes_OI, linear.grid).T.contiguous(),
        f"{name}.qzeros": packing.pack_words(stored_GO, linear.grid),
        f"{name}.scales": linear.scale_OG.T.to(dtype).contiguous(),
        f"{name}.g_idx": torch.arange(num_inputs, dtype=torch.int32) // (num_inputs // linear.scale_OG.shape[1]),
    }


def quantization_config(grid: Grid, ignored: Iterable[str]) -> dict:
    """The entry `quantization_config` of config.json.

    Args:
        ignored: full names of the linears that are not quantized.
    """
    described, left = integer_grid("gptq", grid), set(ignored)
    # vLLM looks for what it makes of several linears under that name alone.
    left |= {
        f"{parent}.{fused}"
        for parent in {name.rpartition(".")[0] for name in left}
        for fused, parts in VLLM_FUSED.items()
        if left.issuperset(f"{parent}.{part}" for part in parts)
    }
    return {
        "quant_method": "gptq",
        "checkpoint_format": "gptq" if described.symmetric else "gptq_v2",
        "bits": described.bits,
        "group_size": described.group_size or -1,
        "sym": described.symmetric,
        "desc_act": False,
        "lm_head": False,
        "pack_dtype": "int32",
        "dynamic": {f"-:^{re.escape(name)}$": {} for name in sorted(left)},
        "meta": {"quantizer": [f"shardq:{__version__}"]},
    }


def encoded_tensors(index: Index, scheme: dict) -> Iterator[SourceTensor]:
    """The weights of a GPTQ checkpoint, of any order of the groups, as `Decoder` gives them.

    Args:
        scheme: the entry `quantization_config` of config.json. Widths and groups are those of the tensors.

    Raises:
        CheckpointError: tensors are missing or do not fit together.
        UnsupportedModelError: another packing than those of this format.
    """
    version = scheme.get("checkpoint_format", scheme.get("format", "gptq"))
    if version not in ("gptq", "gptq_v2") or scheme.get("pack_dtype", "int32") != "int32":
        raise UnsupportedModelError(f"gptq: packing {version} of {scheme.get('pack_dtype', 'int32')} cannot be read")
    for name in [name.removesuffix(".qweight") for name in index if name.endswith(".qweight")]:
        parts = [index.get(f"{name}.{part}") for part in ("qweight", "qzeros", "scales", "g_idx")]
        if None in parts[:3] or (parts[3] is None and scheme.get("desc_act")):
            raise CheckpointError(f"{index[f'{name}.qweight'].file}: {name} lacks a tensor of qzeros, scales and g_idx")
        yield _encoded(name, tuple(part for part in parts if part), zeros_less_one=version == "gptq")


def _encoded(name: str, stored: tuple[TensorInfo, ...], zeros_less_one: bool) -> SourceTensor:
    words, zeros, scales = stored[:3]
    if any(len(part.shape) != 2 or 0 in part.shape for part in (words, zeros, scales)):
        raise CheckpointError(f"{words.file}: qweight, qzeros and scales of {name} are not three matrices")
    num_groups, num_outputs = scales.shape
    bits = zeros.shape[1] * 32 // num_outputs
    num_inputs = words.shape[0] * 32 // max(bits, 1)
    if bits not in BITS or words.shape[1] != num_outputs or zeros.shape[0] != num_groups or num_inputs % num_groups:
        raise CheckpointError(f"{words.file}: qweight, qzeros and scales of {name} do not fit together")
    grid = IntegerGrid(bits=bits, symmetric=False)

    def decode(read: Callable[[TensorInfo, Rows], Tensor], rows: Rows) -> Tensor:
        codes_OI = packing.unpack_words(read(words, None).T, num_inputs, grid)
        zeros_OG = packing.unpack_words(read(zeros, None), num_outputs, grid).T.short()
        if zeros_less_one:
            if (zeros_OG == grid.qmax).any():
                raise CheckpointError(f"{zeros.file}: {name} has a zero point that programs read as 0 or as 2^{bits}")
            zeros_OG = zeros_OG + 1
        group_I = read(stored[3], None) if len(stored) > 3 else None
        values_OI = grid_points(f"{words.file}: {name}", codes_OI, read(scales, None).T, zeros_OG, group_I)
        return values_OI if rows is None else values_OI[rows]

    return SourceTensor(f"{name}.weight", scales.dtype, (num_outputs, num_inputs), stored, decode)
