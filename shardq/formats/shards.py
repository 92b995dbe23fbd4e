"""The index of the tensors in safetensors shards, and reading the bytes of one of them.

Format: https://huggingface.co/docs/safetensors, 8 bytes of header length, a JSON header, then the tensors' bytes.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from io import FileIO
from itertools import groupby
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from shardq.errors import CheckpointError
from shardq.files import storage_errors
from shardq.formats.other_forms import what_it_is

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}
SAMPLE_BYTES = 4096
PIECE_BYTES = 64 << 20  # bytes of a piece of a tensor that is only checked; a multiple of every dtype's size


@dataclass(frozen=True)
class TensorInfo:
    """Place of a tensor: `num_bytes` bytes at `offset` (from the beginning) of `file`."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


Index = dict[str, TensorInfo]


def open_index(folder: Path) -> Index:
    """Read the headers of all shards of a checkpoint folder.

    Returns:
        Every tensor by name, in the order of the shards. No weight is read.

    Raises:
        CheckpointError: no safetensors, a shard missing or truncated, a tensor not where the index says, a name that
            leads out of the folder.
    """
    if (folder / INDEX_FILE).exists():
        weight_map = _read_weight_map(folder / INDEX_FILE)
        headers = {name: read_header(inside(folder, name)) for name in dict.fromkeys(weight_map.values())}
        for tensor, shard in weight_map.items():
            if tensor not in headers[shard]:
                raise CheckpointError(
                    f"{folder / shard}: tensor {tensor} is missing although {INDEX_FILE} places it there; "
                    "download the checkpoint again"
                )
        return {tensor: headers[shard][tensor] for tensor, shard in weight_map.items()}
    if (folder / SINGLE_FILE).exists():
        return read_header(inside(folder, SINGLE_FILE))
    raise CheckpointError(f"{folder}: {what_it_is(folder, SINGLE_FILE, INDEX_FILE)}")


def unread(folder: Path) -> Iterator[str]:
    """What lies in a folder in safetensors but is no part of its checkpoint, a line each: shards, tensors of shards."""
    if not (folder / INDEX_FILE).exists():
        yield from (f"{path.name} (only {SINGLE_FILE} is)" for path in _others(folder, {SINGLE_FILE}))
        return
    weight_map = _read_weight_map(folder / INDEX_FILE)
    yield from (f"{path.name} ({INDEX_FILE} does not name it)" for path in _others(folder, set(weight_map.values())))
    for shard in dict.fromkeys(weight_map.values()):
        names = [name for name in read_header(inside(folder, shard)) if weight_map.get(name) != shard]
        if names:
            more = f" and {len(names) - 1} more tensor(s)" if len(names) > 1 else ""
            yield f"{names[0]}{more} of {shard} ({INDEX_FILE} does not place them there)"


def _others(folder: Path, read: set[str]) -> list[Path]:
    return sorted(path for path in folder.glob("*.safetensors") if path.name not in read)


def _read_weight_map(path: Path) -> dict[str, str]:
    try:
        with storage_errors(path, "read"):
            text = path.read_text(encoding="utf-8")
        weight_map = json.loads(text)["weight_map"]
        if not all(isinstance(shard, str) for shard in weight_map.values()):
            raise TypeError("a shard's name is not text")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a valid index ({error}); download the checkpoint again") from error
    for shard in weight_map.values():
        if Path(shard).name != shard:
            raise CheckpointError(f"{path}: shard name {shard!r} points outside the folder; refused")
    return weight_map


def inside(folder: Path, name: str) -> Path:
    """A file of a checkpoint folder, which links lead to no other place than the Hugging Face cache's own.

    That cache keeps files as `blobs/DIGEST`, beside `snapshots/REVISION` with links to them; `blobs`, or any folder
    above it, may itself be a link to another disk.

    Args:
        name: relative to the folder.

    Raises:
        CheckpointError: the name, or a link of that name, leads elsewhere.
    """
    try:
        real, target = folder.resolve(), (folder / name).resolve()
        snapshots = [place.parent for place in (folder.absolute(), real) if place.parent.name == "snapshots"]
        blobs = [(place.parent / "blobs").resolve() for place in snapshots]
    except (OSError, RuntimeError, ValueError) as error:  # links in a circle; a name that no file can have
        raise CheckpointError(f"{folder}: {name!r} is no file's name ({error}); download it again") from error
    if not target.is_relative_to(real) and target.parent not in blobs:
        raise CheckpointError(
            f"{folder / name}: a link out of the folder, to {target}; refused, put the file itself there"
        )
    return folder / name


def read_header(path: Path) -> Index:
    """Where each tensor of one safetensors file lies.

    Raises:
        CheckpointError: the file is missing, truncated or not safetensors.
    """
    with storage_errors(path, "read"):  # a name may be too long
        is_there = path.is_file()
    if not is_there:
        raise CheckpointError(f"{path}: missing; restore it or download it again")
    with storage_errors(path, "read"), open(path, "rb"):
        pass  # the library would call a file that this user may not read damaged
    try:
        with safe_open(path, framework="pt"):
            pass  # opening lets the library check the whole header against the file's length
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: truncated or not a safetensors file ({error}); download it again") from error
    with open(path, "rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(header_bytes))
    header.pop("__metadata__", None)
    start = 8 + header_bytes
    return {
        name: TensorInfo(
            name, path, entry["dtype"], tuple(entry["shape"]), start + entry["data_offsets"][0],
            entry["data_offsets"][1] - entry["data_offsets"][0],
        )
        for name, entry in header.items()
    }  # fmt: skip


def read_metadata(path: Path) -> dict[str, str]:
    """The free-form text entries of one safetensors file's header."""
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def read_tensor(info: TensorInfo, pinned: bool = False) -> Tensor:
    """Read one tensor into CPU memory, pinned for a GPU to take it from or not, in its stored dtype.

    Plain reads, no memory map: pages of a map would count as resident memory and stall on network file systems.

    Raises:
        CheckpointError: unsupported dtype, or the file ended early.
    """
    _check_dtype(info)
    raw = torch.empty(info.num_bytes, dtype=torch.uint8, pin_memory=pinned)
    with storage_errors(info.file, "read"), open(info.file, "rb", buffering=0) as file:
        _read_into(raw, file, info, 0)
    return raw.view(DTYPES[info.dtype]).reshape(info.shape)


def _check_dtype(info: TensorInfo) -> None:
    if info.dtype not in DTYPES:
        raise CheckpointError(f"{info.file}: tensor {info.name} has unsupported dtype {info.dtype}")


def _read_into(raw: Tensor, file: FileIO, info: TensorInfo, start: int) -> None:
    """Fill `raw` with a tensor's bytes from `start` on."""
    file.seek(info.offset + start)
    view, done = raw.numpy().data, 0
    while done < len(view):
        count = file.readinto(view[done:])
        if not count:
            raise CheckpointError(f"{info.file}: truncated inside tensor {info.name}; download it again")
        done += count


def read_pieces(info: TensorInfo) -> Iterator[Tensor]:
    """Read one tensor piece by piece: flat tensors of its dtype, in order.

    Raises:
        CheckpointError: as `read_tensor`.
    """
    _check_dtype(info)
    with storage_errors(info.file), open(info.file, "rb", buffering=0) as file:
        for start in range(0, info.num_bytes, PIECE_BYTES):
            raw = torch.empty(min(PIECE_BYTES, info.num_bytes - start), dtype=torch.uint8)
            _read_into(raw, file, info, start)
            yield raw.view(DTYPES[info.dtype])


def read_rows(info: TensorInfo, rows: list[int]) -> Tensor:
    """Read some rows (indices of the first dimension, ascending) of a tensor.

    Raises:
        CheckpointError: as `read_tensor`.
    """
    _check_dtype(info)
    row_bytes = info.num_bytes // info.shape[0]
    raw = torch.empty(len(rows) * row_bytes, dtype=torch.uint8)
    with storage_errors(info.file, "read"), open(info.file, "rb", buffering=0) as file:
        # Neighbouring rows have equal differences between row and place: each run of them is one read.
        for _, run in groupby(enumerate(rows), key=lambda item: item[1] - item[0]):
            places = list(run)
            (first, row), (last, _) = places[0], places[-1]
            _read_into(raw[first * row_bytes : (last + 1) * row_bytes], file, info, row * row_bytes)
    return raw.view(DTYPES[info.dtype]).reshape(len(rows), *info.shape[1:])


def read_sample(info: TensorInfo) -> bytes:
    """Bytes from the middle of a tensor, cheap evidence of its content before it is read."""
    place = sample_place(info)
    with storage_errors(info.file, "read"), open(info.file, "rb") as file:
        file.seek(info.offset + place.start)
        return file.read(place.stop - place.start)


def sample_place(info: TensorInfo) -> slice:
    """Which of a tensor's bytes `read_sample` reads."""
    length = min(SAMPLE_BYTES, info.num_bytes)
    start = (info.num_bytes - length) // 2
    return slice(start, start + length)
