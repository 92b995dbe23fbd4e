"""Checkpoints cut after their first decoder blocks, and put together again; without torch, as the launcher is small."""

import json
import re
import shutil
from pathlib import Path
from typing import BinaryIO, NamedTuple

BLOCK_INDEX = re.compile(r"(?:^|\.)layers\.(\d+)\.")
ALIGNMENT = 8  # bytes; the length of a safetensors header is a multiple of it
COPY_BYTES = 1 << 22


class StoredTensor(NamedTuple):
    """A tensor in a safetensors file: dtype and shape as the header has them, its first byte and its bytes."""

    path: Path
    dtype: str
    shape: list[int]
    start: int
    num_bytes: int


def read_headers(paths: list[Path]) -> dict[str, StoredTensor]:
    """The tensors of safetensors files by name; reads the headers only."""
    tensors = {}
    for path in paths:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            tensors[name] = StoredTensor(path, entry["dtype"], entry["shape"], 8 + length + start, end - start)
    return tensors


def truncate(source: Path, target: Path, num_blocks: int) -> None:
    """Write the checkpoint that holds only the first blocks of another, with its tokenizer, in one shard.

    Raises:
        SystemExit: the source is no checkpoint, or has fewer blocks.
    """
    config = truncated_config(source, num_blocks)
    kept = {name: tensor for name, tensor in tensors_of(source).items() if block_index(name) < num_blocks}
    present = {block_index(name) for name in kept}
    if not present.issuperset(range(num_blocks)):
        raise SystemExit(f"{source}: no tensor is named like one of its blocks; --blocks does not know this model")
    write_checkpoint(target, source, config, kept)


def graft(source: Path, truncated: Path, target: Path, num_blocks: int) -> None:
    """Write a whole checkpoint whose first blocks come from a truncated one.

    Perplexity of a truncated model says nothing; that of this one says what its first blocks lost.
    """
    changed = {name: tensor for name, tensor in tensors_of(truncated).items() if 0 <= block_index(name) < num_blocks}
    write_checkpoint(target, source, read_config(source), tensors_of(source) | changed)


def write_checkpoint(target: Path, source: Path, config: dict, tensors: dict[str, StoredTensor]) -> None:
    """Write a checkpoint of one shard, with the tokenizer of the source."""
    target.mkdir(parents=True)
    for path in source.iterdir():
        if path.is_file() and path.suffix != ".safetensors" and not path.name.endswith(".index.json"):
            shutil.copyfile(path, target / path.name)
    (target / "config.json").write_text(json.dumps(config, indent=2))
    write_tensors(target / "model.safetensors", tensors)


def tensors_of(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint by name."""
    return read_headers(sorted(folder.glob("*.safetensors")))


def read_config(folder: Path) -> dict:
    """A checkpoint's config.json."""
    path = folder / "config.json"
    if not path.is_file():
        raise SystemExit(f"{path}: no such file; give --model the folder of a Hugging Face model")
    return json.loads(path.read_text())


def truncated_config(source: Path, num_blocks: int) -> dict:
    """The model's config with fewer blocks; lists with an entry for each block are cut too."""
    config = read_config(source)
    present = config.get("num_hidden_layers", 0)
    if not 0 < num_blocks <= present:
        raise SystemExit(f"{source}: has {present} decoder blocks; choose --blocks from 1 to {present}")
    config["num_hidden_layers"] = num_blocks
    if isinstance(config.get("layer_types"), list):
        config["layer_types"] = config["layer_types"][:num_blocks]
    return config


def write_tensors(path: Path, tensors: dict[str, StoredTensor]) -> None:
    """Copy tensors into one safetensors file, a few MiB in memory at a time."""
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.num_bytes
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % ALIGNMENT)
    with open(path, "wb") as target:
        target.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in tensors.values():
            with open(tensor.path, "rb") as source:
                _copy(source, target, tensor)


def _copy(source: BinaryIO, target: BinaryIO, tensor: StoredTensor) -> None:
    source.seek(tensor.start)
    left = tensor.num_bytes
    while left:
        part = source.read(min(left, COPY_BYTES))
        if not part:
            raise SystemExit(f"{tensor.path}: ends before its last tensor; fetch it again")
        target.write(part)
        left -= len(part)


def block_index(name: str) -> int:
    """The decoder block that a tensor belongs to, -1 for one outside of blocks."""
    match = BLOCK_INDEX.search(name)
    return int(match.group(1)) if match else -1
