"""A finished run in the formats that other programs read, one folder each."""

import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import get_args

import torch

from shardq.config import ExportConfig, Format
from shardq.errors import ConfigError, ShardQError
from shardq.export import contents
from shardq.export.checkpoint import weight_dtype, write_checkpoint
from shardq.files import remove_folder, write_text
from shardq.formats.block_file import read_grids
from shardq.formats.checkpoint import companions, copy_companions, write_config
from shardq.formats.model_card import model_card
from shardq.logs import Display
from shardq.model.skeleton import Skeleton, open_skeleton
from shardq.quant.spec import QuantSpec
from shardq.rundir.encodings import write_encodings
from shardq.rundir.folder import RunFolder
from shardq.rundir.lock import only_run
from shardq.rundir.record import RunRecord
from shardq.rundir.room import Need, bytes_there, check_room, export_bytes
from shardq.rundir.source import check_outside

MODEL_CARD = "README.md"
PACKAGES: dict[Format, str] = {"onnx": "onnxscript", "gguf": "gguf"}  # that a run without these formats needs not
FORMATS: tuple[Format, ...] = get_args(Format)  # each to a folder of its name


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
    blocks = RunRecord.read(skeleton.folder).blocks_digest
    paths = [RunFolder(skeleton.folder).block(number) for number in range(len(skeleton.names))]
    grids = {name: spec for path in paths for name, spec in read_grids(path).items()}
    if not is_begun:  # else room was counted before the run began
        num_bytes = export_bytes(config, skeleton, grids, weight_dtype(config, skeleton, grids).itemsize)
        room = Need(config.format, folder, max(0, num_bytes - bytes_there(folder)))
        check_room([room])
    former = contents.read(folder)
    contents.begin(config, blocks)
    try:
        if not is_begun:
            contents.remove_former(folder, former)
        scale_change = _write_files(config, skeleton, grids, display, is_begun)
        return summary_of(folder, contents.finish(config, blocks, scale_change))
    except ShardQError:
        contents.abandon(folder)
        raise


def write_missing_formats(configs: Iterable[ExportConfig], display: Display) -> None:
    """Write the further formats of a finished run that are not there yet, or not as they are asked for."""
    for config in configs:
        run, record = RunRecord.read(Path(config.run)), contents.read(config.folder)
        if record is None and run.is_of_before and (config.folder / MODEL_CARD).exists():
            continue  # run and export are of before exports had a record
        why = contents.why_unfinished(config, record, run.blocks_digest)
        if why and record:
            display.line(f"{why}; written anew")
            if contents.is_of_other_options(config, record):
                remove_folder(config.folder)
        if why:
            with only_run(config.folder, display.line):
                write_format(config, display)


def summary_of(folder: Path, record: dict) -> dict:
    """What an export's command prints at its end."""
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
            from shardq.export.gguf import write_gguf

            scale_change = write_gguf(skeleton, folder, grids)
        case _:
            scale_change = write_checkpoint(config, skeleton, grids, is_begun)
    if scale_change:
        target = "gguf" if config.format == "gguf" else "vllm"
        display.line(
            f"{folder}: scales were rounded after codes were made, so weights differ from the run's by up to "
            f"{scale_change:.2%}; a run with --target {target} rounds them before"
        )
    manifest = RunRecord.read(skeleton.folder).manifest()
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
    from shardq.export.onnx import write_onnx  # its packages are an extra

    write_onnx(skeleton, folder, grids, display)
    copy_companions(skeleton.folder, folder)
    write_config(skeleton.folder, folder, torch.float32)
    return 0.0
