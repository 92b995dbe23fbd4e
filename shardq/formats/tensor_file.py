"""Our own safetensors files: written whole, read without a memory map."""

import json
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

LARGE_BYTES = 4 << 30  # a file of more is written in the memory of one tensor
# The dtypes of safetensors, the last of its own list first.
ORDER = ("I64", "F64", "F32", "I32", "BF16", "F16", "I16", "F8_E8M0", "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL")


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
    """Write the file that `write_tensors` would, in the memory of one tensor.

    Args:
        make: makes the tensors, by name, one after the other; called twice, first for their shapes.

    Raises:
        StorageError: the disk is full or cannot be written.
    """
    shapes = {name: (_name_of(tensor.dtype), list(tensor.shape), tensor.nbytes) for name, tensor in make()}
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    starts, end = {}, 0
    # The library's order: wide dtypes first, so that each tensor is aligned.
    for name, (dtype, shape, num_bytes) in sorted(shapes.items(), key=lambda item: (ORDER.index(item[1][0]), item[0])):
        starts[name], end = end, end + num_bytes
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [starts[name], end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)

    def write(aside: Path) -> None:
        with open(aside, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name, tensor in make():
                file.seek(8 + len(text) + starts[name])
                on_cpu = to_host(tensor.detach(), mark_ready(tensor)).contiguous()
                file.write(on_cpu.reshape(-1).view(torch.uint8).numpy().data)

    write_whole(path, write)


def _name_of(dtype: torch.dtype) -> str:
    return next(name for name, other in DTYPES.items() if other is dtype)


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
