"""Checks of a finished run, or of an export: every file against its digest, and the files against each other."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice, zip_longest
from pathlib import Path

import torch

from shardq.commands.folder_check import export_faults, folder_faults, unproved
from shardq.config import VerifyConfig
from shardq.errors import ResumeError, ShardQError
from shardq.export import contents
from shardq.formats import encodings
from shardq.formats.block_file import read_activations, read_block, read_grids
from shardq.formats.checkpoint import index_of
from shardq.formats.shards import INDEX_FILE
from shardq.logs import Display
from shardq.model.skeleton import Skeleton, open_skeleton
from shardq.parallel.collectives import on_rank_zero
from shardq.parallel.ranks import Ranks
from shardq.quant.activation import ActivationGrid
from shardq.quant.quantized import QuantizedLinear
from shardq.rundir.account import Account, account_of
from shardq.rundir.folder import MANIFEST, RunFolder
from shardq.rundir.ledger import read_json
from shardq.rundir.manifest import quant_options
from shardq.rundir.plan import Plan, make_plan
from shardq.rundir.record import RunRecord
from shardq.summaries import VerifySummary

CHECKS = {
    "ledger": "the run is finished; every file has the digest that it was finished with",
    "folder": "nothing was added; every line of the events is JSON",
    "exports": "every file of each export has the digest that it was finished with, nothing was added, and it is of "
    "this run's blocks",
    "index": "the checkpoint opens; its index names every tensor in every shard, and nothing else",
    "linears": "every linear to quantize is in its block's file, once, and nothing else",
    "codes": "codes are all there and fit the weight; zero points are codes of the grid",
    "scales": "scales are finite and positive (full-range: not zero; two-level: whole multiples of their channel's)",
    "weights": "every quantized weight of the checkpoint is (code - zero point) * scale, in the dtype it is stored in",
    "finite": "every parameter of the checkpoint is finite",
    "encodings": "encodings, of each block and of the model, are those of the codes, scales and activations' grids",
}
SHOWN = 5  # most faults of a check that the table lists

Faults = dict[str, list[str]]


def verify(config: VerifyConfig, ranks: Ranks) -> VerifySummary:
    """Check all files of a finished run, in the memory of one block, or of an export; print a table of the checks.

    Raises:
        ResumeError: the folder holds neither a run nor an export, or a file in it is damaged; names the file.
    """
    output, display = Path(config.run), Display(ranks.rank)
    is_export = (output / contents.RECORD).exists()
    faults, notes, found, account = on_rank_zero(ranks, lambda: (_of_export if is_export else _of_run)(output))
    checks = ["exports"] if is_export else CHECKS
    display.table(("check", "what", "result"), (_row(check, faults, notes) for check in checks))
    damaged = [fault for found in faults.values() for fault in found]
    if damaged:
        more = f" and {len(damaged) - 1} more" if len(damaged) > 1 else ""
        checks = ", ".join(check for check, found in faults.items() if found)
        mend = "export again" if is_export else "restore the files, or run its command again, which says how to mend it"
        error = ResumeError(f"{output}: damaged ({checks}): {damaged[0]}{more}; {mend}")
        error.agreed = True  # every rank has the same faults
        raise error
    for line in account.lines() if account else ():
        display.line(line)
    return {"output": str(output), **found, **(account.facts() if account else {})}


def _row(check: str, faults: Faults, notes: dict[str, str]) -> tuple[str, str, str]:
    if check not in faults:
        return check, CHECKS[check], "not reached"
    found = faults[check]
    more = [f"and {len(found) - SHOWN} more"] if len(found) > SHOWN else []
    return check, CHECKS[check], "\n".join([*found[:SHOWN], *more]) or notes.get(check, "ok")


def _of_run(output: Path) -> tuple[Faults, dict[str, str], dict, Account | None]:
    faults, num_blocks, num_linears = find_faults(output)
    is_finished = "folder" in faults
    notes = unproved(RunRecord.read(output)) if is_finished else {}
    account = None if any(faults.values()) else _account(output)
    return faults, notes, {"blocks": num_blocks, "linears": num_linears}, account


def _account(output: Path) -> Account:
    """What became of every tensor, of a run without faults."""
    record = RunRecord.read(output)
    quant = quant_options(record.options("quant"))
    paths = (RunFolder(output).block(number) for number in record.blocks)
    return account_of(open_skeleton(output), {name for path in paths for name in read_grids(path)}, quant.ignored)


def _of_export(folder: Path) -> tuple[Faults, dict[str, str], dict, None]:
    record = contents.read(folder)
    facts = {"format": record["format"], "files": len(record.get("files", ()))}
    return {"exports": list(contents.faults(folder, record))}, {}, facts, None


def find_faults(output: Path) -> tuple[Faults, int, int]:
    """Faults by check, one line a fault; number of blocks, and of quantized linears.

    If the run is not finished or its checkpoint does not open, the checks that need it are not among the keys.

    Raises:
        ResumeError: the folder holds no run.
    """
    if not output.exists():
        raise ResumeError(RunRecord(output, []).why_unfinished())
    folder = RunFolder(output)
    if not folder.is_taken:
        raise ResumeError(f"{output}: holds no run of shardq (no {MANIFEST}), nor an export; check the path")
    faults: Faults = {"ledger": []}
    try:
        record = RunRecord.read(output)
        quant = record.options("quant")
    except ResumeError as error:
        return faults | {"ledger": [str(error)]}, 0, 0
    unfinished = record.why_unfinished()
    damaged = {path: fault for _, path, fault in record.damaged_files()}
    if unfinished and not damaged:
        raise ResumeError(unfinished)
    faults["ledger"] = [*damaged.values(), *([unfinished] if unfinished else [])]
    if not (quant or damaged):
        faults["ledger"].append(f"{folder.manifest}: missing, or without the run's options")
    if unfinished or not quant:
        return faults, 0, 0
    faults["folder"] = list(folder_faults(record))
    faults["exports"] = list(export_faults(record))
    if not damaged.keys().isdisjoint((folder.manifest, folder.config)):
        return faults, 0, 0  # the other files are read by these two
    try:
        skeleton = open_skeleton(output)
        has_encodings = record.options("export").get("checkpoint") != "packed"
        plan = replace(make_plan(skeleton, quant_options(quant)), has_encodings=has_encodings)
        faults["index"] = list(_index_faults(skeleton, record))
    except ShardQError as error:
        faults["index"] = [str(error)]
        return faults, 0, 0
    if record.num_done != plan.num_blocks:
        faults["ledger"].append(f"{output}: the ledger has {record.num_done} blocks, the model {plan.num_blocks}")
    faults |= {check: [] for check in CHECKS if check not in faults}
    all_encodings = _Encodings(output, plan.encoding_versions)
    for block in plan.blocks:
        names = [block.full_name(matrix) for matrix in block.grids]
        linears = _check_block(skeleton, RunFolder(output).block(block.index), names, faults)
        faults["encodings"] += all_encodings.faults_of(block.index, names, linears)
    faults["encodings"] += all_encodings.left_over()
    faults["encodings"] += _activation_faults(output, plan)
    faults["finite"] += _infinite(skeleton, plan)
    return faults, plan.num_blocks, plan.num_matrices


def _index_faults(skeleton: Skeleton, record: RunRecord) -> Iterator[str]:
    folder = skeleton.folder
    shards = sorted(name for name in record.files if Path(name).match("model-*.safetensors"))
    expected, said = index_of(folder, shards), read_json(folder / INDEX_FILE)
    for name in sorted(expected["weight_map"].keys() | said["weight_map"].keys()):
        is_in, is_said = (weight_map.get(name) for weight_map in (expected["weight_map"], said["weight_map"]))
        if is_in != is_said:
            yield f"{folder / INDEX_FILE}: {name} is in {is_in or 'no shard'}, the index says {is_said or 'nothing'}"
    if said.get("metadata") != expected["metadata"]:
        yield f"{folder / INDEX_FILE}: metadata is {said.get('metadata')}, not {expected['metadata']}"


def _check_block(skeleton: Skeleton, path: Path, names: list[str], faults: Faults) -> dict[str, QuantizedLinear]:
    try:
        linears = read_block(path)
    except ShardQError as error:
        faults["codes"].append(str(error))
        return {}
    faults["linears"] += [f"{path}: {name} is missing" for name in names if name not in linears]
    faults["linears"] += [f"{path}: {name} does not belong there" for name in linears if name not in names]
    for name in names:
        if name in linears:
            _check_linear(skeleton, path, name, linears[name], faults)
    return linears


def _check_linear(skeleton: Skeleton, path: Path, name: str, linear: QuantizedLinear, faults: Faults) -> None:
    tensor = skeleton.tensor(f"{name}.weight")
    if linear.codes_OI.shape != tensor.shape:
        shapes = f"codes {list(linear.codes_OI.shape)}, its weight {list(tensor.shape)}"
        faults["codes"].append(f"{path}: {name} has {shapes}")
        return
    if not linear.grid.allows_zero_points(linear.zero_point_OG):
        faults["codes"].append(f"{path}: {name} has a zero point that its grid does not allow")
    if not linear.has_valid_scales:
        faults["scales"].append(f"{path}: {name} has a scale that its grid does not allow")
    weight_OI = skeleton.source.read_unchecked(tensor)
    if not weight_OI.isfinite().all():
        faults["finite"].append(f"{tensor.file}: {tensor.name} has a value that is not finite")
    is_off_OI = weight_OI != linear.dequantized(weight_OI.dtype)
    if is_off_OI.any():
        where = torch.nonzero(is_off_OI)[0].tolist()
        faults["weights"].append(f"{tensor.file}: {tensor.name} is off its grid at {where}")


def _infinite(skeleton: Skeleton, plan: Plan) -> Iterator[str]:
    """Parameters, other than quantized weights, with a value that is not finite."""
    outside = [skeleton.tensor(name) for name, _ in skeleton.model.named_parameters()]
    in_blocks = [
        skeleton.tensor(f"{block.name}.{name}")
        for block in plan.blocks
        for name, _ in skeleton.blocks[block.index].named_parameters()
        if name not in {matrix.tensor for matrix in block.grids}
    ]
    for tensor in dict.fromkeys((*outside, *in_blocks)):
        try:
            skeleton.source.read(tensor)
        except ShardQError as error:
            yield str(error).partition(";")[0]


class _Encodings:
    """The encodings of each block, and those of the model, which are read block by block."""

    def __init__(self, output: Path, versions: list[encodings.Version]):
        self._output = output
        self._wholes = {version: RunFolder(output).encodings(version) for version in versions}
        self._streams = {version: encodings.read(path, version) for version, path in self._wholes.items()}

    def faults_of(self, block_index: int, names: list[str], linears: dict[str, QuantizedLinear]) -> Iterator[str]:
        """Entries, of this block and of the model, that differ from codes and scales; in the order of `names`."""
        for version, stream in self._streams.items():
            path = RunFolder(self._output).encodings(version, block_index)
            yield from _differences(path, encodings.read(path, version), version, names, linears)
            yield from _differences(self._wholes[version], islice(stream, len(names)), version, names, linears)

    def left_over(self) -> Iterator[str]:
        """Files of the model that have entries after the last block, or a damaged end."""
        for version, stream in self._streams.items():
            yield from _differences(self._wholes[version], stream, version, [], {})


def _activation_faults(output: Path, plan: Plan) -> Iterator[str]:
    """Encodings of activations, of each block and of the model, that differ from their grids."""
    merged: dict[str, ActivationGrid] = {}
    try:
        for block_index in range(plan.num_blocks):
            grids = read_activations(RunFolder(output).block(block_index))
            merged |= grids
            yield from _activation_differences(output, plan, block_index, grids)
        yield from _activation_differences(output, plan, None, merged)
    except ShardQError as error:
        yield str(error)


def _activation_differences(
    output: Path, plan: Plan, block_index: int | None, grids: dict[str, ActivationGrid]
) -> Iterator[str]:
    for version in plan.encoding_versions:
        path = RunFolder(output).encodings(version, block_index)
        if encodings.read_activations(path, version) != encodings.activations_of(version, grids):
            yield f"{path}: its activations are not what their grids make"


def _differences(
    path: Path, found: Iterator, version: encodings.Version, names: list[str], linears: dict[str, QuantizedLinear]
) -> Iterator[str]:
    try:
        for name, item in zip_longest(names, found):
            if name is None:
                yield f"{path}: holds more than the quantized linears"
            elif name in linears and item != encodings.item_of(version, f"{name}.weight", linears[name]):
                yield f"{path}: {name} is not what its codes and scales make"
    except ShardQError as error:
        yield str(error)
