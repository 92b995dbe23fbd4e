"""compressed-tensors checkpoints, which vLLM and transformers load: tensors of a quantized linear, and the config.

`pack-quantized` where only weights are quantized: `weight_packed` int32 [O, ceil(I * bits / 32)], `weight_scale`
[O, G], `weight_shape` int64 [2] and, on an asymmetric grid, `weight_zero_point` int32 [ceil(O * bits / 32), G].
`int-quantized` where activations are int8 too: `weight` int8 [O, I] and `weight_scale`; each token has a scale that is
found while it runs, or all have the `input_scale` [1] and, on an asymmetric grid, `input_zero_point` int8 [1]. Codes
and config are the library's own (https://github.com/vllm-project/compressed-tensors), and so is the layout of words,
which its packing fills several times as slowly.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from compressed_tensors import CompressionFormat, __version__
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
    QuantizationStrategy,
)
from torch import Tensor

from shardq.errors import CheckpointError, ConfigError, UnsupportedModelError
from shardq.formats.floats import FLOAT8, Block, block_scaled
from shardq.formats.integers import grid_points, integer_grid
from shardq.formats.shards import Index, TensorInfo, read_tensor
from shardq.formats.source import Rows, SourceTensor
from shardq.quant import packing
from shardq.quant.activation import ActivationGrid
from shardq.quant.grid import Grid
from shardq.quant.integer_grid import IntegerGrid
from shardq.quant.quantized import QuantizedLinear

BITS = (4, 8)
OF_INPUTS = ("input_scale", "input_zero_point", "input_global_scale")  # how programs round what enters a linear
_INTEGERS = (("pack-quantized", "int-quantized", "naive-quantized"), ("tensor", "channel", "group"))
# What is read, by type and width: in which forms, with scales by what.
READ = {
    "int4": _INTEGERS,
    "int8": _INTEGERS,
    "float8": (("float-quantized", "naive-quantized", "mxfp8-quantized"), ("tensor", "channel", "block", "group")),
    "float4": (("nvfp4-pack-quantized", "mxfp4-pack-quantized"), ("tensor_group", "group")),
}
PER_TOKEN_INT8 = ActivationGrid(8, symmetric=True)


def check_grid(grid: Grid, activation_bits: int) -> None:
    """Check that the format, as programs read it, can express a grid.

    Raises:
        ConfigError: it cannot.
    """
    if integer_grid("compressed-tensors", grid).bits not in BITS:
        # Other widths lie differently in words of the library's older and newer versions.
        raise ConfigError(f"compressed-tensors: {grid.bits} bits are not supported, only 4 and 8; export hf instead")
    if activation_bits == 8 and grid.has_zero_point:
        raise ConfigError(
            "compressed-tensors: int8 activations need a symmetric weight grid; keep export.activation_bits at 16"
        )
    if activation_bits == 8 and grid.bits == 8 and grid.group_size:
        raise ConfigError(
            f"compressed-tensors: int8 activations beside 8-bit weights in groups of {grid.group_size} have no kernel; "
            "quantize per-channel, or keep export.activation_bits at 16"
        )


def linear_tensors(
    name: str,
    linear: QuantizedLinear,
    dtype: torch.dtype,
    activation_bits: int,
    inputs: dict[str, ActivationGrid] | None = None,
) -> dict[str, Tensor]:
    """The tensors, by full name, that a linear's weight becomes.

    Args:
        name: of the linear.
        dtype: that scales are stored in, the model's: programs would round them to it as they load.
        inputs: by a linear's name the grid of what enters it, where activation_bits is 8 (default: PER_TOKEN_INT8).
    """
    tensors = {f"{name}.weight_scale": linear.scale_OG.to(dtype)}
    if activation_bits == 8:
        grid = (inputs or {}).get(name, PER_TOKEN_INT8)
        return tensors | {f"{name}.weight": linear.codes_OI} | _input_tensors(name, grid, dtype)
    tensors[f"{name}.weight_packed"] = packing.pack_words(linear.codes_OI, linear.grid)
    tensors[f"{name}.weight_shape"] = torch.tensor(linear.codes_OI.shape)
    if linear.grid.has_zero_point:
        tensors[f"{name}.weight_zero_point"] = packing.pack_words(linear.zero_point_OG.char().T, linear.grid).T
    return tensors


def _input_tensors(name: str, grid: ActivationGrid, dtype: torch.dtype) -> dict[str, Tensor]:
    if not grid.is_static:
        return {}
    tensors = {f"{name}.input_scale": torch.tensor([grid.scale], dtype=dtype)}
    if not grid.symmetric:
        tensors[f"{name}.input_zero_point"] = torch.tensor([grid.zero_point], dtype=torch.int8)
    return tensors


def quantization_config(
    grid: Grid, activation_bits: int, ignored: Iterable[str], inputs: ActivationGrid = PER_TOKEN_INT8
) -> dict:
    """The entry `quantization_config` of config.json.

    Args:
        ignored: full names of the linears that are not quantized.
        inputs: a grid like those of all linears' inputs, where activation_bits is 8.
    """
    is_packed = activation_bits == 16
    stored_as = CompressionFormat.pack_quantized if is_packed else CompressionFormat.int_quantized
    described = integer_grid("compressed-tensors", grid)
    weights = QuantizationArgs(
        num_bits=described.bits,
        symmetric=described.symmetric,
        strategy=QuantizationStrategy.GROUP if described.group_size else QuantizationStrategy.CHANNEL,
        group_size=described.group_size,
    )
    strategy = QuantizationStrategy.TENSOR if inputs.is_static else QuantizationStrategy.TOKEN
    activations = QuantizationArgs(
        num_bits=inputs.bits, symmetric=inputs.symmetric, strategy=strategy, dynamic=not inputs.is_static
    )
    scheme = QuantizationScheme(
        targets=["Linear"],
        weights=weights,
        input_activations=None if is_packed else activations,
        format=stored_as.value,
    )
    config = QuantizationConfig(
        config_groups={"group_0": scheme},
        format=stored_as.value,
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=sorted(ignored),
    )
    return config.model_dump(mode="json", exclude_none=True) | {"version": __version__}


def encoded_tensors(index: Index, scheme: dict) -> Iterator[SourceTensor]:
    """The weights of a compressed-tensors checkpoint, packed or int8, as `Decoder` gives them.

    Args:
        scheme: the entry `quantization_config` of config.json.

    Raises:
        CheckpointError: tensors are missing or do not fit together.
        UnsupportedModelError: more is quantized than weights and inputs of linears, or in a way that is not known.
    """
    _check_scheme(scheme)
    blocks = [block for group in scheme["config_groups"].values() for block in _float_blocks(group["weights"])]
    width = _width_in_groups(scheme["config_groups"].values())
    has_zeros = not any(group["weights"].get("symmetric", True) for group in scheme["config_groups"].values())
    for name in [name.removesuffix("_scale") for name in index if name.endswith(".weight_scale")]:
        codes = index.get(f"{name}_packed", index.get(name))
        if codes is None or codes.dtype not in ("I32", "I8", "U8", *FLOAT8):
            raise CheckpointError(f"{index[f'{name}_scale'].file}: {name} has scales, but no codes")
        scale, around = index[f"{name}_scale"], name.removesuffix("weight")
        unused = [index[f"{around}{part}"] for part in OF_INPUTS if f"{around}{part}" in index]
        if codes.dtype not in ("I32", "I8"):
            divisor = index.get(f"{name}_global_scale")
            if codes.dtype == "U8" and scale.dtype in FLOAT8 and divisor is None:
                raise CheckpointError(f"{codes.file}: {name} lacks its global scale; download it again")
            yield block_scaled(name, codes, scale, blocks, unused, divisor)
            continue
        zeros, groups, shape = (index.get(f"{name}_{part}") for part in ("zero_point", "g_idx", "shape"))
        if (zeros is None and has_zeros) or (shape is None and codes.name != name and not width):
            raise CheckpointError(f"{codes.file}: {name} lacks its zero points or its shape; download it again")
        sizes = codes.shape if codes.dtype == "I8" else read_tensor(shape).tolist() if shape else None
        sizes = sizes or (codes.shape[0], codes.shape[-1] * 32 // width)
        unused += [shape] if shape else []
        yield _encoded(name, sizes, codes, scale, zeros, groups, unused)


def _check_scheme(scheme: dict) -> None:
    groups = scheme.get("config_groups")
    groups = list(groups.values()) if isinstance(groups, dict) else []
    if not groups or not all(isinstance(group, dict) and isinstance(group.get("weights"), dict) for group in groups):
        raise UnsupportedModelError("compressed-tensors: config_groups of config.json describes no weights")
    more = [key for key in ("kv_cache_scheme", "sparsity_config", "transform_config") if scheme.get(key)]
    if (scheme.get("sparsity_config") or {}).get("format") == "dense":
        more.remove("sparsity_config")
    found = ", ".join(more)
    for group in groups:
        weights, stored_as = group["weights"], group.get("format") or scheme.get("format")
        number, strategy = f"{weights.get('type', 'int')}{weights.get('num_bits')}", weights.get("strategy")
        forms, strategies = READ.get(number, ((), ()))
        is_read = stored_as in forms and strategy in strategies and not group.get("output_activations")
        if not is_read or (number.startswith("float") and not weights.get("symmetric", True)):
            found = found or f"{number} by {strategy}, {stored_as}"
    if found:
        raise UnsupportedModelError(
            f"compressed-tensors: {found}: cannot be read, only integer weights of 4 and 8 bits, FP8, MXFP8, NVFP4 and "
            "MXFP4 can; pass the checkpoint it was made from"
        )


def _float_blocks(weights: dict) -> list[Block]:
    """The size of a block that has one scale, if the scheme gives one for floats."""
    if weights.get("type", "int") == "int":
        return []
    size = weights.get("block_structure") or [1, weights.get("group_size")]
    if isinstance(size, str):  # older versions of the library wrote "128x128"
        size = [int(part) if part.isdecimal() else 0 for part in size.split("x")]
    is_pair = isinstance(size, list) and len(size) == 2 and all(isinstance(one, int) and one > 0 for one in size)
    return [(size[0], size[1])] if is_pair else []


def _width_in_groups(groups: Iterable[dict]) -> int:
    """The width of all integers where groups of inputs fill whole words, which tell a weight's shape; 0: unknown."""
    widths = {weights["num_bits"] if weights.get("group_size") else 0 for weights in (one["weights"] for one in groups)}
    return widths.pop() if len(widths) == 1 else 0


def _encoded(
    name: str,
    sizes: Sequence[int],
    codes: TensorInfo,
    scale: TensorInfo,
    zeros: TensorInfo | None,
    groups: TensorInfo | None,
    unused: Iterable[TensorInfo],
) -> SourceTensor:
    num_outputs, num_inputs = sizes if len(sizes) == 2 and len(codes.shape) == 2 else (0, 0)
    bits = next((bits for bits in BITS if codes.shape == (num_outputs, -(-num_inputs * bits // 32))), None)
    num_groups = scale.shape[1] if len(scale.shape) > 1 else 1
    fits = num_outputs and num_groups and scale.shape[:1] in ((1,), (num_outputs,)) and num_inputs % num_groups == 0
    if not fits or (bits is None and codes.dtype != "I8"):
        raise CheckpointError(f"{codes.file}: shape, codes and scales of {name} do not fit together")
    grid = IntegerGrid(bits=bits or 8)

    def decode(read: Callable[[TensorInfo, Rows], Tensor], rows: Rows) -> Tensor:
        codes_OI = read(codes, rows)
        if codes.dtype != "I8":
            codes_OI = packing.unpack_words(codes_OI, num_inputs, grid)
        zero_OG = read(zeros, None) if zeros else None
        if zeros and zero_OG is not None and zeros.dtype == "I32":
            zero_OG = packing.unpack_words(zero_OG.T, num_outputs, grid).T
        zero_OG = None if zero_OG is None else zero_OG.reshape(-1, num_groups)
        group_I = read(groups, None) if groups else None
        scale_OG = read(scale, None).view(-1, num_groups)
        if rows is not None and len(scale_OG) > 1:  # a tensor has one scale for all
            scale_OG, zero_OG = scale_OG[rows], zero_OG if zero_OG is None else zero_OG[rows]
        return grid_points(f"{codes.file}: {name}", codes_OI, scale_OG, zero_OG, group_I)

    stored = tuple(info for info in (codes, scale, zeros, groups, *unused) if info)
    return SourceTensor(name, scale.dtype, (num_outputs, num_inputs), stored, decode)
