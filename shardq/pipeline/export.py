"""Files that make a finished block, and a finished run, usable by others."""

import importlib.util
import time
from collections.abc import Callable, Container, Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from shardq.background import lookahead, one_by_one
from shardq.checks import check_export
from shardq.config import ExportConfig, Format
from shardq.errors import ConfigError, ResumeError, ShardQError
from shardq.files import remove_asides, remove_folder, write_text
from shardq.formats import encodings
from shardq.formats.block_file import read_grids, write_block
from shardq.formats.checkpoint import companions, copy_companions, write_config, write_index
from shardq.formats.model_card import model_card
from shardq.formats.shards import DTYPES, INDEX_FILE, TensorInfo, check_same, read_tensor
from shardq.formats.tensor_file import check_finite, write_tensors
from shardq.logs import Display
from shardq.model.skeleton import Skeleton, open_skeleton
from shardq.parallel.collectives import on_rank_zero
from shardq.parallel.ranks import Ranks
from shardq.pipeline import export_record, ledger
from shardq.pipeline.aimet_export import merge_encodings, write_encodings
from shardq.pipeline.checkpoint_export import weight_dtype, write_checkpoint
from shardq.pipeline.lock import only_run
from shardq.pipeline.plan import Plan, block_file, encodings_file
from shardq.pipeline.room import Need, bytes_there, check_room, export_bytes
from shardq.pipeline.source import check_outside
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
    device: torch.device,
) -> list[Path]:
    """Write a block's codes, encodings and weights; each file appears whole.

    Args:
        linears, activations: by name within the block.
        device: that computed them: where it is a GPU, the files are written at the same time.

    Returns:
        The files.
    """
    prefix = plan.names[block_index]
    full = {f"{prefix}.{name}": linear for name, linear in linears.items()}
    grids = {f"{prefix}.{name}": grid for name, grid in activations.items()}

    def write_weights(path: Path) -> None:
        weights = {}
        for name, info in skeleton.block_tensors(block_index).items():
            linear = linears.get(name.removesuffix(".weight"))
            is_codes = linear is not None and name.endswith(".weight")
            weights[info.name] = linear.dequantized(dtype) if is_codes else _copied(skeleton, info)
            if is_codes:
                check_finite(path, {info.name: weights[info.name]})
        write_tensors(path, weights, {"format": "pt"})

    writers = {block_file(output, block_index): lambda path: write_block(path, full, grids)}
    for version in plan.encoding_versions:
        path = encodings_file(output, version, block_index)
        writers[path] = lambda path, version=version: encodings.write(path, version, full, grids)
    writers[output / plan.block_shard(block_index)] = write_weights
    # With a CPU one after the other: its cores, which a background thread gets one of, compute what is written.
    at_once = partial(lookahead, threads=len(writers)) if device.type == "cuda" else one_by_one
    return [path for path, _ in at_once(lambda path: writers[path](path), writers)]


def _copied(skeleton: Skeleton, info: TensorInfo) -> Tensor:
    """A tensor of the source, which has been read and checked before, as it is."""
    return check_same(info, read_tensor(info), skeleton.digests, skeleton.samples)


def write_run_files(
    output: Path, skeleton: Skeleton, plan: Plan, dtype: torch.dtype, kept: Container[Path] = ()
) -> list[Path]:
    """Write what completes the checkpoint: tensors outside the blocks, index, config, tokenizer, merged encodings.

    Args:
        kept: of the large files, those that are there and stay.

    Returns:
        The files whose digests complete the ledger.
    """
    rest = {output / plan.rest_shard(number): infos for number, infos in enumerate(plan.rest)}
    for path, infos in rest.items():
        if path not in kept:
            write_tensors(path, {info.name: _copied(skeleton, info) for info in infos}, {"format": "pt"})
    merged = {encodings_file(output, version): version for version in plan.encoding_versions}
    for path, version in merged.items():
        if path not in kept:
            merge_encodings(output, version, output, plan.num_blocks)
    copies = copy_companions(skeleton.folder, output)
    write_config(skeleton.folder, output, dtype)
    write_index(output, plan.shards())
    return [*rest, *merged, *copies, output / "config.json", output / INDEX_FILE]


def export(config: ExportConfig, ranks: Ranks) -> dict:
    """Convert a finished run for other programs, in the memory of one block; rank 0 does it.

    Returns:
        `output`, `format`, `bytes` (of the files), `seconds`, `scale_change` (the largest relative change of a scale by
        rounding it to the dtype that the format keeps it in).

    One that is finished is left as it is; one that was cut short, or is of a run that has changed since, is written
    anew.

    Raises:
        ConfigError: the format cannot express the run's grid, or what an option asks for; the output folder holds
            something else.
        ResumeError: the folder holds no finished run, or its files have changed.
    """
    check_export(config)
    start, display = time.perf_counter(), Display(ranks.rank)
    summary = on_rank_zero(ranks, lambda: _export(config, display))
    return summary | {"seconds": round(time.perf_counter() - start, 3)}


def _export(config: ExportConfig, display: Display) -> dict:
    """Write an export, or what is left of one, if it is not finished yet."""
    run, folder = Path(config.run), config.folder
    export_record.check_place(folder)
    entries = ledger.finished(ledger.read_lines(run))
    for fault in ledger.why_unfinished(run, entries):
        raise ResumeError(fault)
    try:
        with only_run(folder, display.line):
            remove_asides(folder)
            record = export_record.read(folder)
            if record and export_record.is_of_other_options(config, record):
                held = export_record.options_of(record)
                raise ConfigError(f"output: {folder} holds an export to {held}; choose another or delete it")
            why = export_record.why_unfinished(config, record, ledger.blocks_digest(entries))
            if record and not why:
                display.line(f"{folder}: this export is finished, nothing is left to do")
                return _summary(folder, record)
            if record:
                display.line(f"{why}; exported anew")
            ledger.check_finished(run)
            return write_format(config, display)
    except ShardQError:
        with suppress(OSError):
            folder.rmdir()  # of an export that was refused; not one that holds something
        raise


def write_format(config: ExportConfig, display: Display, is_begun: bool = False) -> dict:
    """Write a run in one format, over what an earlier attempt may have left; the record of it all comes last.

    Args:
        is_begun: whether shards of a checkpoint that are there are those of the run's blocks, and stay.

    Returns:
        As `export`, but for `seconds`.
    """
    skeleton, folder = open_skeleton(Path(config.run)), config.folder
    companions(skeleton.folder)  # one that must not be copied is refused now
    if not is_begun:
        check_outside(skeleton)  # runs of earlier versions may hold what is not finite
    display.line(f"{folder}: writing {config.format}, {len(skeleton.names)} blocks")
    blocks = ledger.blocks_digest(ledger.finished(ledger.read_lines(skeleton.folder)))
    paths = [block_file(skeleton.folder, number) for number in range(len(skeleton.names))]
    grids = {name: spec for path in paths for name, spec in read_grids(path).items()}
    if not is_begun:  # else room was counted before the run began
        num_bytes = export_bytes(config, skeleton, grids, weight_dtype(config, skeleton, grids).itemsize)
        room = Need(config.format, folder, max(0, num_bytes - bytes_there(folder)))
        check_room([room])
    former = export_record.read(folder)
    export_record.begin(config, blocks)
    try:
        if not is_begun:
            export_record.remove_former(folder, former)
        scale_change = _write_files(config, skeleton, grids, display, is_begun)
        return _summary(folder, export_record.finish(config, blocks, scale_change))
    except ShardQError:
        export_record.abandon(folder)
        raise


def write_missing_formats(configs: Iterable[ExportConfig], display: Display) -> None:
    """Write the further formats of a finished run that are not there yet, or not as they are asked for."""
    for config in configs:
        entries = ledger.finished(ledger.read_lines(Path(config.run)))
        record = export_record.read(config.folder)
        if record is None and "bytes" not in entries[None] and (config.folder / MODEL_CARD).exists():
            continue  # run and export are of before exports had a record
        why = export_record.why_unfinished(config, record, ledger.blocks_digest(entries))
        if why and record:
            display.line(f"{why}; written anew")
            if export_record.is_of_other_options(config, record):
                remove_folder(config.folder)
        if why:
            with only_run(config.folder, display.line):
                write_format(config, display)


def _summary(folder: Path, record: dict) -> dict:
    num_bytes, scale_change = sum(record["bytes"].values()), record["scale_change"]
    return {"output": str(folder), "format": record["format"], "bytes": num_bytes, "scale_change": scale_change}


def _write_files(
    config: ExportConfig, skeleton: Skeleton, grids: dict[str, QuantSpec], display: Display, is_begun: bool
) -> float:
    """Write an export's files, the model card last; give the largest relative change of a scale by its rounding."""
    folder = config.folder
    match config.format:
        case "aimet":
            scale_change = 0.0
            write_encodings(skeleton.folder, len(skeleton.names), folder, config.aimet.version)
        case "onnx":
            scale_change = _write_onnx(skeleton, grids, folder, display)
        case "gguf":
            check_installed("gguf")
            from shardq.pipeline.gguf_export import write_gguf

            scale_change = write_gguf(skeleton, folder, grids)
        case _:
            scale_change = write_checkpoint(config, skeleton, grids, is_begun)
    if scale_change:
        target = "gguf" if config.format == "gguf" else "vllm"
        display.line(
            f"{folder}: scales were rounded after codes were made, so weights differ from the run's by up to "
            f"{scale_change:.2%}; a run with --target {target} rounds them before"
        )
    manifest = ledger.read_manifest(skeleton.folder)
    if config.format == "compressed-tensors" and manifest["options"].get("activations", {}).get("kv_bits"):
        display.line(f"{folder}: without the run's grids of keys and values; vLLM would take float8 alone")
    spec = next(iter(grids.values()))
    activation_bits = config.activation_bits if config.format == "compressed-tensors" else 16
    write_text(folder / MODEL_CARD, model_card(manifest, spec, config.format, activation_bits, scale_change))
    return scale_change


def check_installed(kind: Format) -> None:
    """Check that the package which writes a format is there.

    Raises:
        ConfigError: it is not; says how to install it.
    """
    package = PACKAGES.get(kind)
    if package and importlib.util.find_spec(package) is None:
        raise ConfigError(f"format {kind}: the package {package} is missing; pip install 'shardq[{kind}]'")


def _write_onnx(skeleton: Skeleton, grids: dict[str, QuantSpec], folder: Path, display: Display) -> float:
    """Write a run as ONNX; scales stay as they are."""
    check_installed("onnx")
    from shardq.pipeline.onnx_export import write_onnx  # its packages are an extra

    write_onnx(skeleton, folder, grids, display)
    copy_companions(skeleton.folder, folder)
    write_config(skeleton.folder, folder, torch.float32)
    return 0.0
