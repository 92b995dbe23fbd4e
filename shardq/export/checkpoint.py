"""A run as a checkpoint that programs load: a shard of each block, from its codes, and the files that complete it."""

import shutil
from collections.abc import Container
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from shardq.config import ExportConfig
from shardq.errors import ConfigError
from shardq.files import write_whole
from shardq.formats import compressed_tensors, gptq
from shardq.formats.block_file import read_activations, read_block, read_grids
from shardq.formats.checkpoint import copy_companions, plain_tensors, write_config, write_index
from shardq.formats.shards import DTYPES, read_header, read_tensor
from shardq.formats.tensor_file import check_finite, write_tensors
from shardq.model.skeleton import Skeleton
from shardq.quant.activation import ActivationGrid
from shardq.quant.quantized import QuantizedLinear
from shardq.quant.spec import QuantSpec
from shardq.rundir.folder import RunFolder


def write_block_shard(config: ExportConfig, skeleton: Skeleton, block_index: int, shard: str) -> None:
    """Write a block's shard in another format, once its files are there; it appears whole.

    Args:
        skeleton: of the model, the run's source or its result.
        shard: name of the block's file in the run's checkpoint, and in the other.

    Raises:
        ConfigError: the run has other grids for what enters the linears than the option asks for.
        QuantizationError: a weight or a scale is beyond the dtype that the format keeps it in.
    """
    path = RunFolder(Path(config.run)).block(block_index)
    linears = {skeleton.stored(f"{name}.weight").name: linear for name, linear in read_block(path).items()}
    inputs = _input_grids(config, skeleton, block_index)
    dtype = _embedding_dtype(skeleton)
    tensors: dict[str, Tensor] = {}
    for name, info in read_header(Path(config.run) / shard).items():
        if name in linears:
            of_linear = _linear_tensors(config, name.removesuffix(".weight"), linears[name], dtype, inputs)
            check_finite(config.folder / shard, of_linear)
            tensors |= of_linear
        else:
            tensors[name] = read_tensor(info)
    write_tensors(config.folder / shard, tensors, {"format": "pt"})


def write_checkpoint(config: ExportConfig, skeleton: Skeleton, grids: dict[str, QuantSpec], is_begun: bool) -> float:
    """Write a run as a checkpoint; give the largest relative change of a scale by its rounding.

    Args:
        skeleton: of the run's result.
        grids: by full name of the linear.
        is_begun: whether the shards that are there are those of this run's blocks, and stay.

    Raises:
        ConfigError: the format cannot express the grids.
    """
    spec, folder = next(iter(grids.values())), config.folder
    scheme = _quantization_config(config, skeleton, grids)
    shards = sorted({info.file.name for info in skeleton.index.values()})
    for number, shard in enumerate(shards):
        if is_begun and (folder / shard).exists():
            continue
        if number < len(skeleton.names):
            write_block_shard(config, skeleton, number, shard)
        else:  # outside the blocks nothing is quantized
            write_whole(folder / shard, partial(shutil.copyfile, skeleton.folder / shard))
    write_index(folder, shards)
    copy_companions(skeleton.folder, folder)
    scale_dtype = _model_dtype(spec, _embedding_dtype(skeleton))
    write_config(skeleton.folder, folder, weight_dtype(config, skeleton, grids), **scheme)
    return 0.0 if config.format == "hf" else _scale_change(skeleton, scale_dtype)


def weight_dtype(config: ExportConfig, skeleton: Skeleton, grids: dict[str, QuantSpec]) -> torch.dtype:
    """Dtype in which a checkpoint's plain weights are to be loaded."""
    if config.format == "hf" and config.dtype == "float32":
        return torch.float32
    return _model_dtype(next(iter(grids.values())), _embedding_dtype(skeleton))


def _linear_tensors(
    config: ExportConfig,
    name: str,
    linear: QuantizedLinear,
    embedding_dtype: torch.dtype,
    inputs: dict[str, ActivationGrid],
) -> dict[str, Tensor]:
    """The tensors, by full name, that a linear's weight becomes."""
    dtype = _model_dtype(linear.spec, embedding_dtype)
    if config.format == "hf":
        return plain_tensors(name, linear, torch.float32 if config.dtype == "float32" else dtype)
    rounded = replace(linear, scale_OG=linear.scale_OG.to(dtype).float())
    if config.format == "gptq":
        return gptq.linear_tensors(name, rounded, dtype)
    return compressed_tensors.linear_tensors(name, rounded, dtype, config.activation_bits, inputs)


def _quantization_config(config: ExportConfig, skeleton: Skeleton, grids: dict[str, QuantSpec]) -> dict[str, dict]:
    """The entry of config.json that describes the grids; none for plain weights."""
    spec = next(iter(grids.values()))
    match config.format:
        case "gptq":
            gptq.check_grid(spec)
            described = gptq.quantization_config(spec, _linears_left(skeleton, grids))
        case "compressed-tensors":
            compressed_tensors.check_grid(spec, config.activation_bits)
            numbers = range(len(skeleton.names))
            inputs = (grid for number in numbers for grid in _input_grids(config, skeleton, number).values())
            described = compressed_tensors.quantization_config(
                spec, config.activation_bits, _linears_left(skeleton, grids), *list(inputs)[:1]
            )
        case _:
            return {}
    return {"quantization_config": described}


def _input_grids(config: ExportConfig, skeleton: Skeleton, block_index: int) -> dict[str, ActivationGrid]:
    """The 8-bit grids, by its linear's stored name, that a block has for what enters them, where these are asked for.

    Raises:
        ConfigError: it has others.
    """
    path, grids = RunFolder(Path(config.run)).block(block_index), {}
    if config.activation_bits == 16:
        return grids
    activations = read_activations(path)
    for name in read_grids(path):
        grid = activations.get(f"{name}.input")
        if grid is None:
            continue
        if grid.bits != config.activation_bits:
            raise ConfigError(
                f"activation_bits: 8, but the run has grids of {grid.bits} bits for what enters {name}; "
                "quantize with --activations.bits 8, or export with --activation_bits 16"
            )
        grids[skeleton.stored(f"{name}.weight").name.removesuffix(".weight")] = grid
    return grids


def _scale_change(skeleton: Skeleton, dtype: torch.dtype) -> float:
    """The largest relative change of a scale of a run by rounding it to a dtype."""
    largest = 0.0
    for number in range(len(skeleton.names)):
        for name, info in read_header(RunFolder(skeleton.folder).block(number)).items():
            if name.endswith(".scale"):
                scale_OG = read_tensor(info)
                largest = max(largest, (scale_OG.to(dtype).float() / scale_OG - 1).abs().max().item())
    return largest


def _linears_left(skeleton: Skeleton, quantized: Container[str]) -> set[str]:
    """Names of the linears that are not quantized, the model's and, where it differs, the checkpoint's.

    Whatever else is stored as a matrix counts as one, but for embeddings: a program may build linears of what
    transformers builds otherwise (routers) or not at all (layers that predict further tokens, parts for images), and
    would look for packed ones.
    """
    modules = dict(skeleton.model.named_modules())
    for block_name, block in zip(skeleton.names, skeleton.blocks, strict=True):
        modules |= {f"{block_name}.{name}": module for name, module in block.named_modules()}
    left = {name for name, module in modules.items() if isinstance(module, nn.Linear) and name not in quantized}
    others = {
        skeleton.stored(f"{name}.weight").name
        for name, module in modules.items()
        if name in quantized or isinstance(module, nn.Embedding)
    }
    matrices = {name for name, info in skeleton.index.items() if name.endswith(".weight") and len(info.shape) == 2}
    return left | {name.removesuffix(".weight") for name in matrices - others}


def _model_dtype(spec: QuantSpec, embedding_dtype: torch.dtype) -> torch.dtype:
    """Dtype of the model that programs make of a checkpoint, in which they keep scales."""
    return getattr(torch, spec.scale_dtype) if spec.scale_dtype else embedding_dtype


def _embedding_dtype(skeleton: Skeleton) -> torch.dtype:
    """Dtype of the source, whose embeddings a run copies."""
    table = skeleton.model.get_input_embeddings()
    name = next(name for name, module in skeleton.model.named_modules() if module is table)
    return DTYPES[skeleton.stored(f"{name}.weight").dtype]
