"""Checks before work starts that each disk has room for the files that a run has still to write."""

from collections.abc import Iterator
from pathlib import Path

from shardq.calib.partition import owned_samples
from shardq.commands.prepare import Run
from shardq.config import TuneConfig
from shardq.export.checkpoint import model_dtype
from shardq.export.chosen import checkpoints_of, formats_of, own_form
from shardq.formats import encodings
from shardq.formats.options import ExportOptions
from shardq.model.skeleton import Skeleton
from shardq.model.weights import COMPUTE_DTYPE
from shardq.parallel.collectives import together
from shardq.parallel.ranks import Ranks
from shardq.rundir.folder import RunFolder
from shardq.rundir.ledger import Entries
from shardq.rundir.manifest import export_options
from shardq.rundir.plan import Plan
from shardq.rundir.record import RunRecord
from shardq.rundir.room import HEADER_BYTES, Need, bytes_there, check_room, code_bytes
from shardq.training.memory import MOMENTS


def check_space(run: Run) -> None:
    """Check on every host that there is room for the files that it writes.

    Raises:
        StorageError: a disk has too little room; names the folder, the needed and the free bytes.
    """
    if not run.record.is_finished:
        together(run.ranks, lambda: check_room(needed(run)) if run.ranks.local_rank == 0 else None)


def needed(run: Run) -> list[Need]:
    """Bytes that this host's ranks have still to write; rank 0 writes everything except the activations."""
    needs = []
    if run.ranks.rank == 0:
        files = dict(_files(run.output, run.skeleton, run.plan, run.config.export, run.record.entries))
        needs.append(Need("weights and encodings", run.output, _growth(files)))
        if run.config.checkpoint.every_iterations and run.largest:
            # A new checkpoint of s2 and its moments is written before the previous one is removed.
            num_tensors = 1 + MOMENTS[run.config.optimize.optimizer]
            needs.append(Need("checkpoints", run.output, int(2 * num_tensors * 4 * run.largest.size.num_weights)))
    if (
        run.config.uses_data
        and run.config.cache.placement == "disk"
        and (run.config.cache.folder or run.ranks.rank == 0)
    ):
        there, num_redos = 0, run.record.num_redos - run.begins_redo
        if RunFolder(run.output).manifest.exists():
            # Kept, or removed when a redo begins.
            there = bytes_there(RunFolder(run.output).cache(run.config.cache, num_redos))
        folder = Path(run.config.cache.folder or run.output)
        needs.append(Need("activations", folder, max(0, cache_bytes(run) - there), "--cache.folder"))
    return needs


def check_space_for_tuning(
    config: TuneConfig, skeleton: Skeleton, plan: Plan, manifest: dict, record: RunRecord, ranks: Ranks, shape: tuple
) -> None:
    """Check on every host that there is room for the files that a tuning writes.

    Args:
        skeleton: skeleton of the float model.
        plan: with the blocks' arguments.
        manifest, record: manifest and record of the tuned run.
        shape: number of samples, and of tokens in each.

    Raises:
        StorageError: as `check_space`.
    """
    output, needs = config.folder, []
    if ranks.rank == 0:
        export = export_options(manifest)
        files = dict(_files(output, skeleton, plan, export, record.entries))
        state = 2 * 8 * plan.num_scales  # a new state is written before the previous one is removed
        needs.append(Need("weights, encodings and state", output, _growth(files) + state))
    if config.cache.placement == "disk" and (config.cache.folder or ranks.rank == 0):
        # For all samples, the first block's input, the last block's output, and two generations between them; then each
        # block's input for a batch.
        held = _held(shape[0], ranks, config.cache.folder is None)
        batch = min(held, manifest["tuned"]["options"]["batch_size"])
        num_samples = max(3 * held, 2 * held + batch * (plan.num_blocks - 1))
        folder = Path(config.cache.folder or output)
        hidden = num_samples * _sample_bytes(shape[1], plan.blocks[0].arguments.width)
        needs.append(Need("activations", folder, hidden + held * _own_bytes(plan), "--cache.folder"))
    together(ranks, lambda: check_room(needs) if ranks.local_rank == 0 else None)


def cache_bytes(run: Run) -> int:
    """The largest size of this host's activations at any time, or of all hosts' if they share the folder.

    Two generations of both streams. Generation 0 is kept once for both, and the last block's output only for fp. By
    parts, also what enters a block's experts in both streams, their choice, and their outputs at the start and the end;
    and the codes of experts that are trained.
    """
    num_samples, length = run.tokens_NT.shape
    held = _held(num_samples, run.ranks, run.config.cache.folder is None)
    arguments = [block.arguments for block in run.plan.blocks]
    by_parts = run.config.optimize.experts == "parts"
    hidden = (min(run.plan.num_blocks + 1, 4) + 5 * by_parts) * _sample_bytes(length, arguments[0].width)
    carried = 4 * max(passed.carried_bytes + HEADER_BYTES * len(passed.carried_names) for passed in arguments)
    codes = [sum(code_bytes(matrix.shape, grid) for matrix, grid in block.grids.items()) for block in run.plan.blocks]
    return held * (hidden + _own_bytes(run.plan) + carried) + by_parts * max(codes)


def _own_bytes(plan: Plan) -> int:
    """Bytes of a sample's own arguments of all blocks, which are written before the first block is computed."""
    own: dict[tuple[int, str], int] = {}
    for block in plan.blocks:
        own |= block.arguments.own_bytes
    return sum(own.values()) + HEADER_BYTES * len(own)


def _held(num_samples: int, ranks: Ranks, is_shared: bool) -> int:
    """Samples of this host's ranks, or of all where they share the folder."""
    sharing = range(ranks.first_on_host, ranks.first_on_host + ranks.local_world_size)
    if is_shared:
        sharing = range(ranks.world_size)
    return sum(len(owned_samples(num_samples, rank, ranks.world_size)) for rank in sharing)


def _sample_bytes(length: int, width: int) -> int:
    """Bytes of a sample's hidden states on the disk, between two blocks."""
    return length * width * COMPUTE_DTYPE.itemsize + HEADER_BYTES


def _growth(files: dict[Path, int]) -> int:
    """Bytes that writing files takes; a file that replaces another exists in addition to it until it is complete."""
    growth = sum(max(0, size - bytes_there(path)) for path, size in files.items())
    return growth + max(map(bytes_there, files), default=0)


def _files(
    output: Path,
    skeleton: Skeleton,
    plan: Plan,
    export: ExportOptions,
    finished: Entries,
) -> Iterator[tuple[Path, int]]:
    """Every large file that is still to be written in an output folder, with its approximate size in bytes."""
    own, itemsize = own_form(export), model_dtype(skeleton, next(iter(plan.grids.values()))).itemsize
    formats, checkpoints = formats_of(export), checkpoints_of(export)
    in_others = dict.fromkeys(formats, 0)
    for block in plan.blocks:
        grids = {matrix.tensor: grid for matrix, grid in block.grids.items()}
        tensors = skeleton.held_tensors(block.index)
        if block.index not in finished:
            yield output / plan.block_shard(block.index), own.block_bytes(tensors, grids, itemsize)
            codes = sum(code_bytes(matrix.shape, grid) for matrix, grid in block.grids.items())
            yield RunFolder(output).block(block.index), codes
            for version in plan.encoding_versions:
                path = RunFolder(output).encodings(version, block.index)
                yield path, encodings.BYTES_A_SCALE[version] * block.num_scales
        for name, chosen in formats.items():
            num_bytes = chosen.block_bytes(tensors, grids, itemsize)
            in_others[name] += num_bytes
            path = output / name / plan.block_shard(block.index)
            if name in checkpoints and (block.index not in finished or not path.exists()):
                yield path, num_bytes
    for number, tensors in enumerate(plan.rest):
        rest = sum(tensor.num_bytes + HEADER_BYTES for tensor in tensors)
        for name, chosen in formats.items():
            in_others[name] += rest * chosen.holds_weights
        for folder in ("", *checkpoints):
            yield output / folder / plan.rest_shard(number), rest
    for version in plan.encoding_versions:
        yield RunFolder(output).encodings(version), encodings.BYTES_A_SCALE[version] * plan.num_scales
    yield from ((output / name, num_bytes) for name, num_bytes in in_others.items() if name not in checkpoints)
