"""Our own safetensors files: written whole, read without a memory map."""

import zlib
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from shardq.errors import CheckpointError, StorageError
from shardq.files import write_whole
from shardq.formats.shards import read_header, read_metadata, read_tensor

CHECKED = "tensor"


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors to one safetensors file that appears whole.

    Args:
        tensors: any device; moved to CPU.
        metadata: at most one entry: the library writes several in random order, and equal runs must give equal bytes.

    Raises:
        StorageError: the disk is full or cannot be written.
    """
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    def write(aside: Path) -> None:
        try:
            save_file(on_cpu, aside, metadata)
        except SafetensorError as error:
            # The library hides the system's error number in its text.
            raise StorageError(
                f"{path}: cannot be written ({error}); make room or mend the disk and run the same command again"
            ) from error

    write_whole(path, write)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of one file into CPU memory.

    Raises:
        CheckpointError: the file is missing, truncated or not safetensors.
    """
    return {name: read_tensor(info) for name, info in read_header(path).items()}


def write_checked(path: Path, tensor: Tensor) -> None:
    """Write one tensor and a checksum of its bytes to a file that appears whole; raises as `write_tensors`."""
    on_cpu = tensor.detach().cpu().contiguous()
    write_tensors(path, {CHECKED: on_cpu}, {"crc32": _checksum(on_cpu)})


def read_checked(path: Path) -> Tensor:
    """Read what `write_checked` wrote.

    Raises:
        CheckpointError: the file is missing or truncated, or its bytes are not those that were written.
    """
    tensor = read_tensors(path).get(CHECKED)
    if tensor is None or read_metadata(path).get("crc32") != _checksum(tensor):
        raise CheckpointError(f"{path}: damaged; its checksum differs")
    return tensor


def _checksum(tensor: Tensor) -> str:
    """CRC-32: finds every flipped bit and all bursts up to 32 bits, at a fraction of SHA-256's cost."""
    return f"{zlib.crc32(memoryview(tensor.reshape(-1).view(torch.uint8).numpy())):08x}"
