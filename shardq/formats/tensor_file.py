"""Our own safetensors files: written whole, read without a memory map."""

import json
import mmap
import os
from collections.abc import Callable, Iterable, Mapping
from math import prod
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import save, save_file
from torch import Tensor

from shardq.devices import mark_ready, to_host
from shardq.errors import CheckpointError, QuantizationError, StorageError
from shardq.files import write_whole
from shardq.formats.shards import read_header, read_metadata, read_tensor


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors to one safetensors file that appears whole.

    Args:
        tensors: any device; moved to CPU.
        metadata: at most one entry: the library writes several in random order, and equal runs must give equal bytes.

    Raises:
        StorageError: the disk is full or cannot be written.
    """
    # Through pinned memory: a plain copy of a block's weights from a GPU takes longer than to write them (measured).
    on_cpu = {name: to_host(tensor.detach(), mark_ready(tensor)).contiguous() for name, tensor in tensors.items()}

    def write(aside: Path) -> None:
        try:
            save_file(on_cpu, aside, metadata)
        except SafetensorError as error:
            # The library hides the system's error number in its text.
            raise StorageError(
                f"{path}: cannot be written ({error}); make room or mend the disk and run the same command again"
            ) from error

    write_whole(path, write)


def write_filled(
    path: Path,
    like: Mapping[str, Tensor],
    fill: Callable[[dict[str, Tensor]], Iterable[object]],
    metadata: dict[str, str] | None = None,
) -> None:
    """Write as `write_tensors`, to the byte, tensors that need not be in memory together.

    Args:
        like: their dtypes and shapes, on the meta device.
        fill: is given the tensors in the file, and fills them while it is iterated; after each step, what has been
            filled so far no longer takes memory of this process.
        metadata: as in `write_tensors`.

    Raises:
        StorageError: as `write_tensors`.
    """
    header, places = _header_of(like, metadata)
    size = len(header) + sum(tensor.nbytes for tensor in like.values())

    def write(aside: Path) -> None:
        with open(aside, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, size)  # a full disk is an error here, in a mapped file it is a signal
            mapped = mmap.mmap(file.fileno(), size)
        mapped[: len(header)] = header
        tensors = {
            name: torch.frombuffer(mapped, dtype=tensor.dtype, count=tensor.numel(), offset=len(header) + places[name])
            .view(tensor.shape) if tensor.numel() else torch.empty(tensor.shape, dtype=tensor.dtype)
            for name, tensor in like.items()
        }  # fmt: skip
        for _ in fill(tensors):
            mapped.madvise(mmap.MADV_DONTNEED)
        mapped.flush()

    write_whole(path, write)


def _header_of(like: Mapping[str, Tensor], metadata: dict[str, str] | None) -> tuple[bytes, dict[str, int]]:
    """Header of a safetensors file, and each tensor's place behind it: in the library's order."""
    empty = save({name: tensor.new_empty(0, device="cpu") for name, tensor in like.items()}, metadata)
    facts = json.loads(empty[8 : 8 + int.from_bytes(empty[:8], "little")])
    places, place = {}, 0
    for name in facts:
        if name != "__metadata__":
            end = place + prod(like[name].shape) * like[name].itemsize
            facts[name] |= {"shape": list(like[name].shape), "data_offsets": [place, end]}
            places[name], place = place, end
    text = json.dumps(facts, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, places


def check_finite(path: Path, tensors: dict[str, Tensor]) -> None:
    """Check that no value of some tensors, which a file is to hold, is beyond its dtype.

    Raises:
        QuantizationError: one is not finite; names it.
    """
    for name, tensor in tensors.items():
        if not (tensor.is_floating_point() and tensor.numel()):
            continue
        # An infinity is the least value or the greatest, and a NaN comes through.
        if not all(torch.isfinite(end) for end in tensor.aminmax()):
            raise QuantizationError(
                f"{path}: {name} has a value that is not finite in {str(tensor.dtype).removeprefix('torch.')}; "
                "keep it in float32, or leave the linear as it is with --quant.ignore"
            )


def read_tensors(path: Path, pinned: bool = False) -> dict[str, Tensor]:
    """Read all tensors of one file into CPU memory, pinned for a GPU to take them from or not.

    Raises:
        CheckpointError: the file is missing, truncated or not safetensors.
    """
    return {name: read_tensor(info, pinned) for name, info in read_header(path).items()}


def write_checked(path: Path, tensors: dict[str, Tensor], about: dict | None = None) -> None:
    """Write tensors, JSON about them, and a checksum of it all to a file that appears whole.

    Raises as `write_tensors`.
    """
    # Not through pinned memory: a training checkpoint's are many times a block's weights.
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(about, sort_keys=True)
    write_tensors(path, on_cpu, {"checked": f"{_checksum(on_cpu, text)} {text}"})


def read_checked(path: Path, pinned: bool = False) -> tuple[dict[str, Tensor], dict | None]:
    """Read what `write_checked` wrote: the tensors, and what it says about them.

    Raises:
        CheckpointError: the file is missing or truncated, or its bytes are not those that were written.
    """
    tensors = read_tensors(path, pinned)
    checksum, _, text = read_metadata(path).get("checked", "").partition(" ")
    if checksum != _checksum(tensors, text):
        raise CheckpointError(f"{path}: damaged; its checksum differs")
    try:
        return tensors, json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged; what it says about itself is no JSON") from error


def _checksum(tensors: dict[str, Tensor], text: str) -> str:
    """XXH3, 64 bits: damage goes unnoticed once in 2^64; at 10 GB/s, where CRC-32's 2 held training up (measured)."""
    digest = xxhash.xxh3_64(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
