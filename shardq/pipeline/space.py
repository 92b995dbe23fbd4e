"""What a run has still to write, against the room on each disk, before work starts."""

import os
import shutil
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from shardq.calib.partition import owned_samples
from shardq.errors import StorageError
from shardq.files import nearest_folder
from shardq.formats import encodings
from shardq.model.weights import COMPUTE_DTYPE
from shardq.parallel.collectives import together
from shardq.pipeline import ledger
from shardq.pipeline.export import stored_dtype
from shardq.pipeline.folders import cache_folder
from shardq.pipeline.memory import MOMENTS
from shardq.pipeline.plan import block_file, encodings_file
from shardq.pipeline.prepare import Run
from shardq.quant.packing import packed_width

HEADER_BYTES = 256  # of a safetensors file, a tensor


@dataclass(frozen=True)
class Need:
    """Bytes of one kind that a run has still to write in a folder, which may not be there yet."""

    what: str
    folder: Path
    num_bytes: int
    option: str = "--output"


def check_space(run: Run) -> None:
    """Check on every host that there is room for what it writes; disks are told apart by the file system's number.

    Raises:
        StorageError: naming the folder, the bytes that are needed and those that are there.
    """
    if None in ledger.finished(run.lines):
        return

    def check() -> None:
        for needs, num_free in _by_disk(needed(run)):
            total = sum(need.num_bytes for need in needs)
            if total > num_free:
                parts = ", ".join(f"{need.what} {_size(need.num_bytes)}" for need in needs)
                folders = " and ".join(dict.fromkeys(str(need.folder) for need in needs))
                options = " or ".join(dict.fromkeys(need.option for need in needs))
                raise StorageError(
                    f"{folders}: {_size(total)} are still to be written there ({parts}), {_size(num_free)} are free; "
                    f"make room, or choose another {options}"
                )

    together(run.ranks, lambda: check() if run.ranks.local_rank == 0 else None)


def needed(run: Run) -> list[Need]:
    """What this host's ranks have still to write; rank 0 writes all but the activations."""
    needs = []
    if run.ranks.rank == 0:
        files = dict(_files(run))
        # A file that takes another's place stands beside it until it is whole.
        growth = sum(max(0, size - _there(path)) for path, size in files.items())
        needs.append(Need("weights and encodings", run.output, growth + max(map(_there, files), default=0)))
        if run.config.checkpoint.every_iterations:
            # The newest of s2 and its moments stands beside its predecessor.
            num_tensors = 1 + MOMENTS[run.config.optimize.optimizer]
            needs.append(Need("checkpoints", run.output, int(2 * num_tensors * 4 * run.largest.size.num_weights)))
    if run.config.cache.placement == "disk" and (run.config.cache.folder or run.ranks.rank == 0):
        there, num_redos = 0, len(ledger.redo_lines(run.lines)) - run.begins_redo
        if (run.output / ledger.MANIFEST).exists():
            there = _there(cache_folder(run.config, run.output, num_redos))  # kept, or removed as a redo begins
        folder = Path(run.config.cache.folder or run.output)
        needs.append(Need("activations", folder, max(0, cache_bytes(run) - there), "--cache.folder"))
    return needs


def cache_bytes(run: Run) -> int:
    """The most that this host's activations take at a time, or those of all hosts where they share the folder.

    Two generations of both streams, of which generation 0 is one, and the last block's output is the fp stream's alone.
    """
    ranks, (num_samples, length) = run.ranks, run.tokens_NT.shape
    sharing = range(ranks.first_on_host, ranks.first_on_host + ranks.local_world_size)
    if run.config.cache.folder is None:
        sharing = range(ranks.world_size)
    held = sum(len(owned_samples(num_samples, rank, ranks.world_size)) for rank in sharing)
    sample = length * run.arguments[0].width * COMPUTE_DTYPE.itemsize + HEADER_BYTES
    return held * min(run.plan.num_blocks + 1, 4) * sample


def _files(run: Run) -> Iterator[tuple[Path, int]]:
    """Every large file that is still to be written in the output folder, and about how many bytes it will have."""
    plan, output, spec, export = run.plan, run.output, run.config.quant.spec, run.config.export
    itemsize = stored_dtype(run.skeleton, plan, export.dtype).itemsize
    finished, all_scales, num_bytes = ledger.finished(run.lines), 0, 0
    for block_index in range(plan.num_blocks):
        tensors = run.skeleton.block_tensors(block_index)
        quantized = [tensors[f"{name}.weight"] for name in plan.linears[block_index]]
        scales = sum(info.shape[0] * (info.shape[1] // (spec.group_size or info.shape[1])) for info in quantized)
        codes = sum(info.shape[0] * packed_width(info.shape[1], spec.bits) for info in quantized)
        codes += scales * (4 if spec.symmetric else 5) + 3 * HEADER_BYTES * len(quantized)
        weights = sum(info.shape[0] * info.shape[1] for info in quantized)
        others = sum(info.num_bytes + HEADER_BYTES for info in tensors.values())
        others -= sum(info.num_bytes for info in quantized)
        if block_index not in finished:
            yield output / plan.block_shard(block_index), others + weights * itemsize
            yield block_file(output, block_index), codes
            for version in plan.encoding_versions:
                yield encodings_file(output, version, block_index), encodings.BYTES_A_SCALE[version] * scales
        in_format = {"hf": weights * itemsize, "gptq": codes, "compressed-tensors": codes}
        if export.activation_bits == 8:
            in_format["compressed-tensors"] = weights  # a byte each at any width
        for chosen in export.checkpoints:
            path = output / chosen / plan.block_shard(block_index)
            if block_index not in finished or not path.exists():
                yield path, others + in_format[chosen]
        all_scales, num_bytes = all_scales + scales, num_bytes + others + codes
    for number, infos in enumerate(plan.rest):
        rest = sum(info.num_bytes + HEADER_BYTES for info in infos)
        num_bytes += rest
        for folder in ("", *export.checkpoints):
            yield output / folder / plan.rest_shard(number), rest
    for version in plan.encoding_versions:
        yield encodings_file(output, version), encodings.BYTES_A_SCALE[version] * all_scales
    for chosen in export.asked:
        if chosen == "aimet":
            yield output / chosen, 2 * encodings.BYTES_A_SCALE[export.aimet.version] * all_scales
        elif chosen not in export.checkpoints:
            yield output / chosen, num_bytes


def _by_disk(needs: list[Need]) -> Iterator[tuple[list[Need], int]]:
    """Needs that share a disk, and the bytes that are free there."""
    by_device: dict[int, list[Need]] = defaultdict(list)
    for need in needs:
        by_device[os.stat(nearest_folder(need.folder)).st_dev].append(need)
    for shared in by_device.values():
        yield shared, shutil.disk_usage(nearest_folder(shared[0].folder)).free


def _there(path: Path) -> int:
    """Bytes of a file, or of all in a folder; 0 if it is not there."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def _size(num_bytes: int) -> str:
    if num_bytes < 1e6:
        return f"{num_bytes / 1e3:.1f} kB"
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"
