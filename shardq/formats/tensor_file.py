"""Our own safetensors files: written whole, read without a memory map."""

import json
import struct
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from shardq.devices import mark_ready, to_host
from shardq.errors import CheckpointError, QuantizationError, StorageError
from shardq.files import write_whole
from shardq.formats.shards import DTYPES, read_header, read_metadata, read_tensor

NAMES = {dtype: name for name, dtype in DTYPES.items()}
ORDER = (
    "U64",
    "I64",
    "F64",
    "F32",
    "U32",
    "I32",
    "BF16",
    "F16",
    "U16",
    "I16",
    "F8_E8M0",
    "F8_E4M3",
    "F8_E5M2",
    "I8",
    "U8",
    "BOOL",
)  # of the dtypes in a file, as the library sorts them: wide ones first, so all are aligned


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


def write_one_by_one(
    path: Path, make: Callable[[], Iterable[tuple[str, Tensor]]], metadata: dict[str, str] | None = None
) -> None:
    """Write the bytes that `write_tensors` would, with one tensor in memory at a time.

    Args:
        make: gives the tensors; called twice, as the file begins with all shapes.

    Raises:
        StorageError: the disk is full or cannot be written.
    """
    shapes = {name: (tensor.dtype, tuple(tensor.shape), tensor.nbytes) for name, tensor in make()}
    entries: dict[str, dict] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name in sorted(shapes, key=lambda name: (ORDER.index(NAMES[shapes[name][0]]), name)):
        dtype, shape, num_bytes = shapes[name]
        entries[name] = {"dtype": NAMES[dtype], "shape": shape, "data_offsets": [end, end + num_bytes]}
        end += num_bytes
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)

    def write(aside: Path) -> None:
        with open(aside, "r+b") as file:
            file.write(struct.pack("<Q", len(header)) + header)
            for name, tensor in make():
                file.seek(8 + len(header) + entries[name]["data_offsets"][0])
                on_cpu = to_host(tensor.detach(), mark_ready(tensor)).contiguous()
                file.write(on_cpu.view(-1).view(torch.uint8).numpy().data if on_cpu.numel() else b"")
            file.truncate(8 + len(header) + end)

    write_whole(path, write)


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
