"""Our own safetensors files: written whole, read without a memory map."""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from shardq.errors import StorageError
from shardq.files import write_whole
from shardq.formats.shards import read_header, read_tensor


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
