"""Files that make a finished block, and a finished run, usable by others."""

import importlib.util
import shutil
import time
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor, nn

from shardq.config import ExportConfig, Format, check_export
from shardq.errors import ConfigError
from shardq.files import write_text, write_whole
from shardq.formats import compressed_tensors, encodings
from shardq.formats.block_file import read_activations, read_block, read_grids, write_block
from shardq.formats.checkpoint import copy_companions, plain_tensors, write_config, write_index
from shardq.formats.model_card import model_card
from shardq.formats.shards import DTYPES, INDEX_FILE, read_header, read_tensor
from shardq.formats.tensor_file import write_tensors
from shardq.logs import Display
from shardq.model.skeleton import Skeleton, open_skeleton
from shardq.parallel.collectives import on_rank_zero
from shardq.parallel.ranks import Ranks
from shardq.pipeline import ledger
from shardq.pipeline.plan import Plan, block_file, encodings_files
from shardq.quant.activation import ActivationGrid
from shardq.quant.quantized import QuantizedLinear
from shardq.quant.spec import QuantSpec

MODEL_CARD = "README.md"
PACKAGES: dict[Format, str] = {"onnx": "onnxscript", "gguf": "gguf"}  # that a run without these formats needs not

COMPLETING = ("config.json", INDEX_FILE, "model.encodings", "model_torch.encodings")
FORMATS: tuple[Format, ...] = get_args(Format)  # each to a folder of its name


def stored_dtype(skeleton: Skeleton, plan: Plan, option: str) -> torch.dtype:
    """Dtype of the quantized linears' weights in the output checkpoint."""
    if option == "float32":
        return torch.float32
    block_index = next(number for number, names in enumerate(plan.linears) if names)
    name = f"{plan.names[block_index]}.{plan.linears[block_index][0]}.weight"
    return DTYPES[skeleton.stored(name).dtype]


def rounding_to(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Function that rounds a float32 weight to what a dtype can hold, and keeps it in float32."""
    return lambda weight: weight.to(dtype).to(weight.dtype)


def write_block_files(
    output: Path,
    skeleton: Skeleton,
    plan: Plan,
    block_index: int,
    linears: dict[str, QuantizedLinear],
    activations: dict[str, ActivationGrid],
    dtype: torch.dtype,
) -> list[Path]:
    """Write a block's codes, encodings and weights; each file appears whole.

    Args:
        linears, activations: by name within the block.

    Returns:
        The files.
    """
    prefix = plan.names[block_index]
    full = {f"{prefix}.{name}": linear for name, linear in linears.items()}
    grids = {f"{prefix}.{name}": grid for name, grid in activations.items()}
    codes_file = block_file(output, block_index)
    v1_file, torch_file = encodings_files(output, block_index)
    weights_file = output / plan.block_shard(block_index)
    write_block(codes_file, full, grids)
    entries = (encodings.encoding_v1(f"{name}.weight", linear) for name, linear in full.items())
    encodings.write_v1(v1_file, entries, grids)
    entries = ((f"{name}.weight", encodings.encoding_torch(linear)) for name, linear in full.items())
    encodings.write_torch(torch_file, entries, grids)
    weights = {}
    for name, info in skeleton.block_tensors(block_index).items():
        linear = linears.get(name.removesuffix(".weight"))
        is_codes = linear is not None and name.endswith(".weight")
        weights[info.name] = linear.dequantized().to(dtype) if is_codes else read_tensor(info)
    write_tensors(weights_file, weights, {"format": "pt"})
    return [codes_file, v1_file, torch_file, weights_file]


def write_run_files(output: Path, skeleton: Skeleton, plan: Plan, dtype: torch.dtype) -> list[Path]:
    """Write what completes the checkpoint: tensors outside the blocks, index, config, tokenizer, merged encodings.

    Returns:
        The files whose digests complete the ledger.
    """
    rest = []
    for number, infos in enumerate(plan.rest):
        rest.append(output / plan.rest_shard(number))
        write_tensors(rest[-1], {info.name: read_tensor(info) for info in infos}, {"format": "pt"})
    config_file, index_file, v1_file, torch_file = (output / name for name in COMPLETING)
    grids = all_activations(output, plan.num_blocks)
    encodings.write_v1(v1_file, _merged(output, plan, 0, encodings.read_v1), grids)
    encodings.write_torch(torch_file, _merged(output, plan, 1, encodings.read_torch), grids)
    copy_companions(skeleton.folder, output)
    write_config(skeleton.folder, output, _name(dtype))
    write_index(output, plan.shards())
    return [*rest, v1_file, torch_file, config_file, index_file]


def all_activations(output: Path, num_blocks: int) -> dict[str, ActivationGrid]:
    """The grids of all blocks' activations, by full name."""
    files = (block_file(output, number) for number in range(num_blocks))
    return {name: grid for path in files for name, grid in read_activations(path).items()}


def _merged(output: Path, plan: Plan, which: int, read: Callable[[Path], Iterator]) -> Iterator:
    for block_index in range(plan.num_blocks):
        yield from read(encodings_files(output, block_index)[which])


def export(config: ExportConfig, ranks: Ranks) -> dict:
    """Convert a finished run for other programs, in the memory of one block; rank 0 does it.

    Returns:
        `output`, `format`, `bytes` (of the files), `seconds`, `scale_change` (the largest relative change of a scale by
        rounding it to the dtype that the format keeps it in).

    Raises:
        ConfigError: the format cannot express the run's grid, or what an option asks for; the output folder holds
            something.
        ResumeError: the folder holds no finished run, or its files have changed.
    """
    check_export(config)
    start, run = time.perf_counter(), Path(config.run)
    folder = Path(config.output) if config.output else run / config.format

    def convert() -> dict:
        ledger.check_finished(run)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(f"output: {folder} is not an empty folder; choose another or delete it")
        return write_format(config, folder, Display(ranks.rank))

    return on_rank_zero(ranks, convert) | {"seconds": round(time.perf_counter() - start, 3)}


def write_format(config: ExportConfig, folder: Path, display: Display) -> dict:
    """Write a finished run in one format, over what an earlier attempt may have left; the model card comes last.

    Returns:
        As `export`, but for `seconds`.
    """
    skeleton = open_skeleton(Path(config.run))
    grids = {name: spec for path in _block_files(skeleton) for name, spec in read_grids(path).items()}
    match config.format:
        case "onnx":
            scale_change = _write_onnx(skeleton, grids, folder)
        case "gguf":
            check_installed("gguf")
            from shardq.pipeline.gguf_export import write_gguf

            scale_change = write_gguf(skeleton, folder, grids)
        case _:
            scale_change = _write_checkpoint(config, skeleton, grids, folder)
    if scale_change:
        target = "gguf" if config.format == "gguf" else "vllm"
        display.line(
            f"{folder}: scales were rounded after codes were made, so weights differ from the run's by up to "
            f"{scale_change:.2%}; a run with --target {target} rounds them before"
        )
    manifest = ledger.read_manifest(skeleton.folder)
    spec = next(iter(grids.values()))
    activation_bits = config.activation_bits if config.format == "compressed-tensors" else 16
    write_text(folder / MODEL_CARD, model_card(manifest, spec, config.format, activation_bits, scale_change))
    num_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return {"output": str(folder), "format": config.format, "bytes": num_bytes, "scale_change": scale_change}


def check_installed(kind: Format) -> None:
    """Check that the package which writes a format is there.

    Raises:
        ConfigError: it is not; says how to install it.
    """
    package = PACKAGES.get(kind)
    if package and importlib.util.find_spec(package) is None:
        raise ConfigError(f"format {kind}: the package {package} is missing; pip install 'shardq[{kind}]'")


def _write_onnx(skeleton: Skeleton, grids: dict[str, QuantSpec], folder: Path) -> float:
    """Write a run as ONNX; scales stay as they are."""
    check_installed("onnx")
    from shardq.pipeline.onnx_export import write_onnx  # its packages are an extra

    write_onnx(skeleton, folder, grids)
    copy_companions(skeleton.folder, folder)
    write_config(skeleton.folder, folder, "float32")
    return 0.0


def _write_checkpoint(config: ExportConfig, skeleton: Skeleton, grids: dict[str, QuantSpec], folder: Path) -> float:
    """Write a run as a checkpoint that programs load; give the largest relative change of a scale."""
    spec = next(iter(grids.values()))
    model_dtype = getattr(torch, spec.scale_dtype) if spec.scale_dtype else _embedding_dtype(skeleton)
    dtype = scale_dtype = model_dtype
    entries, ignored = {}, _linears_left(skeleton, grids)
    match config.format:
        case "hf":
            scale_dtype = torch.float32
            dtype = torch.float32 if config.dtype == "float32" else model_dtype
            convert = partial(plain_tensors, dtype=dtype)
        case "compressed-tensors":
            bits = config.activation_bits
            compressed_tensors.check_grid(spec, bits)
            inputs = _input_grids(skeleton, grids) if bits == 8 else {}
            convert = partial(compressed_tensors.linear_tensors, dtype=dtype, activation_bits=bits, inputs=inputs)
            scheme = compressed_tensors.quantization_config(spec, bits, ignored, *list(inputs.values())[:1])
            entries = {"quantization_config": scheme}
    scale_change = _write_shards(skeleton, folder, convert, scale_dtype)
    copy_companions(skeleton.folder, folder)
    write_config(skeleton.folder, folder, _name(dtype), **entries)
    return scale_change


def _write_shards(
    skeleton: Skeleton,
    folder: Path,
    convert: Callable[[str, QuantizedLinear], dict[str, Tensor]],
    scale_dtype: torch.dtype,
) -> float:
    """Write a run's shards with its linears converted, and the index; give the largest relative change of a scale."""
    shards = sorted({info.file.name for info in skeleton.index.values()})
    largest = 0.0
    for shard, path in zip(shards, _block_files(skeleton), strict=False):
        linears = {skeleton.stored(f"{name}.weight").name: linear for name, linear in read_block(path).items()}
        tensors: dict[str, Tensor] = {}
        for name, info in read_header(skeleton.folder / shard).items():
            if name in linears:
                linear = linears[name]
                rounded = replace(linear, scale_OG=linear.scale_OG.to(scale_dtype).float())
                largest = max(largest, (rounded.scale_OG / linear.scale_OG - 1).abs().max().item())
                tensors |= convert(name.removesuffix(".weight"), rounded)
            else:
                tensors[name] = read_tensor(info)
        write_tensors(folder / shard, tensors, {"format": "pt"})
    for shard in shards[len(skeleton.names) :]:  # outside the blocks nothing is quantized
        write_whole(folder / shard, partial(shutil.copyfile, skeleton.folder / shard))
    write_index(folder, shards)
    return largest


def _input_grids(skeleton: Skeleton, linear_names: Iterable[str]) -> dict[str, ActivationGrid]:
    """The 8-bit grids, one a linear, by its stored name, that a run has for what enters them; none if it has none.

    Raises:
        ConfigError: it has others.
    """
    activations = all_activations(skeleton.folder, len(skeleton.names))
    inputs = {name: activations[f"{name}.input"] for name in linear_names if f"{name}.input" in activations}
    for name, grid in inputs.items():
        if grid.bits != 8:
            raise ConfigError(
                f"activation_bits: 8, but the run has grids of {grid.bits} bits for what enters {name}; "
                "quantize with --activations.bits 8, or export with --activation_bits 16"
            )
    return {skeleton.stored(f"{name}.weight").name.removesuffix(".weight"): grid for name, grid in inputs.items()}


def _block_files(skeleton: Skeleton) -> list[Path]:
    return [block_file(skeleton.folder, number) for number in range(len(skeleton.names))]


def _linears_left(skeleton: Skeleton, quantized: Container[str]) -> set[str]:
    """Names of the linears that are not quantized, the model's and, where it differs, the checkpoint's."""
    modules = dict(skeleton.model.named_modules())
    for block_name, block in zip(skeleton.names, skeleton.blocks, strict=True):
        modules |= {f"{block_name}.{name}": module for name, module in block.named_modules()}
    left = {name for name, module in modules.items() if isinstance(module, nn.Linear) and name not in quantized}
    return left | {skeleton.stored(f"{name}.weight").name.removesuffix(".weight") for name in left}


def _embedding_dtype(skeleton: Skeleton) -> torch.dtype:
    """Dtype of the source, whose embeddings a run copies."""
    table = skeleton.model.get_input_embeddings()
    name = next(name for name, module in skeleton.model.named_modules() if module is table)
    return DTYPES[skeleton.stored(f"{name}.weight").dtype]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
