"""Sizes of the files that will be written, and the check that each disk has room for them."""

import os
import shutil
from collections import defaultdict
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from shardq.errors import StorageError
from shardq.files import nearest_folder
from shardq.formats.source import SourceTensor
from shardq.quant.grid import Grid
from shardq.quant.packing import packed_width

HEADER_BYTES = 256  # of a safetensors file, a tensor


@dataclass(frozen=True)
class Need:
    """Bytes of one kind that are still to be written in a folder, which may not exist yet.

    `option` is the option that chooses another folder.
    """

    what: str
    folder: Path
    num_bytes: int
    option: str = "--output"


def check_room(needs: list[Need]) -> None:
    """Check that there is room; a disk is identified by the file system's number.

    Raises:
        StorageError: a disk has too little room; names the folders, the needed and the free bytes.
    """
    for shared, num_free in _by_disk(needs):
        total = sum(need.num_bytes for need in shared)
        if total > num_free:
            parts = ", ".join(f"{need.what} {readable(need.num_bytes)}" for need in shared)
            folders = " and ".join(dict.fromkeys(str(need.folder) for need in shared))
            options = " or ".join(dict.fromkeys(need.option for need in shared))
            raise StorageError(
                f"{folders}: {readable(total)} are still to be written there ({parts}), {readable(num_free)} are free; "
                f"make room, or choose another {options}"
            )


def code_bytes(shape: tuple[int, ...], grid: Grid) -> int:
    """Bytes of a weight [O, I] as packed codes with scales and zero points."""
    scales = grid.num_scales(*shape) * (5 if grid.has_zero_point else 4)
    return shape[0] * packed_width(shape[1], grid.bits) + scales + 3 * HEADER_BYTES


def other_bytes(tensors: Mapping[str, SourceTensor], quantized: Container[str]) -> int:
    """Bytes of a block's tensors, given by name, without those that are quantized."""
    return sum(HEADER_BYTES + tensor.num_bytes * (name not in quantized) for name, tensor in tensors.items())


def bytes_there(path: Path) -> int:
    """Bytes of a file, or of all files in a folder; 0 if it does not exist."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def _by_disk(needs: list[Need]) -> Iterator[tuple[list[Need], int]]:
    """Needs that share a disk, and the bytes that are free there."""
    by_device: dict[int, list[Need]] = defaultdict(list)
    for need in needs:
        by_device[os.stat(nearest_folder(need.folder)).st_dev].append(need)
    for shared in by_device.values():
        yield shared, shutil.disk_usage(nearest_folder(shared[0].folder)).free


def readable(num_bytes: int) -> str:
    """A number of bytes for people, such as `7.2 MB`."""
    if num_bytes < 1e6:
        return f"{num_bytes / 1e3:.1f} kB"
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"
