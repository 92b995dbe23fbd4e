"""A finished run in the formats that other programs read, one folder each."""

from collections.abc import Iterable
from pathlib import Path

from shardq.config import ExportConfig
from shardq.errors import ShardQError
from shardq.export import contents
from shardq.export.base import Format, Grids
from shardq.export.checkpoint import model_dtype
from shardq.export.chosen import check_installed, format_of
from shardq.export.model_card import model_card
from shardq.files import remove_folder, write_text
from shardq.formats.block_file import read_grids
from shardq.formats.checkpoint import companions, copy_companions
from shardq.formats.source import stored_in
from shardq.logs import Display
from shardq.model.build import factory_of
from shardq.model.skeleton import Skeleton, open_skeleton
from shardq.rundir.account import account_of
from shardq.rundir.folder import MODEL_CARD, RunFolder
from shardq.rundir.lock import only_run
from shardq.rundir.manifest import quant_options
from shardq.rundir.record import RunRecord
from shardq.rundir.room import HEADER_BYTES, Need, bytes_there, check_room
from shardq.rundir.source import check_outside


def write_format(config: ExportConfig, display: Display, is_begun: bool = False) -> dict:
    """Write a run in one format, over files of an earlier attempt; the record is written last.

    Args:
        is_begun: whether a checkpoint's existing shards are those of the run's blocks, and stay.

    Returns:
        The summary of `export` without `seconds`.
    """
    skeleton, folder, chosen = open_skeleton(Path(config.run)), config.folder, format_of(config.format, config)
    companions(skeleton.folder)  # refuses a file that must not be copied before any work
    if not is_begun:
        check_outside(skeleton)  # runs of earlier versions may have values that are not finite
    display.line(f"{folder}: writing {chosen.name}, {len(skeleton.names)} blocks")
    blocks = RunRecord.read(skeleton.folder).blocks_digest
    paths = [RunFolder(skeleton.folder).block(number) for number in range(len(skeleton.names))]
    grids = {name: grid for path in paths for name, grid in read_grids(path).items()}
    check_installed(chosen)
    chosen.check(skeleton, grids)
    if not is_begun:  # otherwise the run has checked the room before it began
        num_bytes = _num_bytes(chosen, skeleton, grids)
        room = Need(chosen.name, folder, max(0, num_bytes - bytes_there(folder)))
        check_room([room])
    former = contents.read(folder)
    contents.begin(config, blocks)
    try:
        if not is_begun:
            contents.remove_former(folder, former)
        scale_change = _write_files(chosen, skeleton, grids, folder, display, is_begun)
        return summary_of(folder, contents.finish(config, blocks, scale_change))
    except ShardQError:
        contents.abandon(folder)
        raise


def write_missing_formats(configs: Iterable[ExportConfig], display: Display) -> None:
    """Write the further formats of a finished run that are not there yet, or not as they are asked for."""
    for config in configs:
        run, record = RunRecord.read(Path(config.run)), contents.read(config.folder)
        if record is None and run.is_of_before and (config.folder / MODEL_CARD).exists():
            continue  # run and export were made before exports had a record
        why = contents.why_unfinished(config, record, run.blocks_digest)
        if why and record:
            display.line(f"{why}; written anew")
            if contents.is_of_other_options(config, record):
                remove_folder(config.folder)
        if why:
            with only_run(config.folder, display.line):
                write_format(config, display)


def summary_of(folder: Path, record: dict) -> dict:
    """The summary of an export."""
    num_bytes, scale_change = sum(record["bytes"].values()), record["scale_change"]
    return {"output": str(folder), "format": record["format"], "bytes": num_bytes, "scale_change": scale_change}


def _write_files(
    chosen: Format, skeleton: Skeleton, grids: Grids, folder: Path, display: Display, is_begun: bool
) -> float:
    """Write an export's files, the model card last; return the largest relative change of a scale by its rounding."""
    scale_change = chosen.write(skeleton, grids, folder, display, is_begun)
    if chosen.holds_weights:
        copy_companions(skeleton.folder, folder)
    if scale_change:
        display.line(
            f"{folder}: scales were rounded after codes were made, so weights differ from the run's by up to "
            f"{scale_change:.2%}; a run with --target {chosen.rounded_by} rounds them before"
        )
    record = RunRecord.read(skeleton.folder)
    account = account_of(skeleton, grids, quant_options(record.options("quant")).ignored)
    if chosen.is_of_text and account.beside_text():
        display.line(f"{folder}: {chosen.name} is of the text decoder alone, without {account.beside_text()}")
    is_packed = chosen.rounded_by == "vllm"
    factory = factory_of(skeleton.model) if skeleton.joins_experts or not is_packed else ""
    write_text(folder / MODEL_CARD, model_card(record, skeleton.folder, grids, chosen, factory, scale_change, account))
    return scale_change


def _num_bytes(chosen: Format, skeleton: Skeleton, grids: Grids) -> int:
    """Approximate bytes of an export of a run."""
    total, itemsize = 0, model_dtype(skeleton, next(iter(grids.values()))).itemsize
    left = dict(skeleton.source.index)
    for number, block_name in enumerate(skeleton.names):
        tensors = skeleton.held_tensors(number)
        names = {name: f"{block_name}.{name}".removesuffix(".weight") for name in tensors}
        quantized = {name: grids[full] for name, full in names.items() if full in grids}
        total += chosen.block_bytes(tensors, quantized, itemsize)
        for info in stored_in(skeleton.source.tensors[name] for name in skeleton.held_pieces(number)):
            left.pop(info.name, None)
    return total + chosen.holds_weights * sum(info.num_bytes + HEADER_BYTES for info in left.values())
