"""The output checkpoint: shard names, index, config and the files copied beside them."""

import json
import shutil
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from shardq.files import write_json, write_whole
from shardq.formats.shards import INDEX_FILE, TensorInfo, inside, read_header
from shardq.quant.quantized import QuantizedLinear

COPIED_PATTERNS = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.jinja",
                   "generation_config.json", "LICENSE*")  # fmt: skip


def shard_name(number: int, total: int) -> str:
    """File name of shard `number` (from 1) of `total`, as transformers writes them."""
    return f"model-{number:05d}-of-{total:05d}.safetensors"


def group_by_size(infos: Iterable[TensorInfo], limit_bytes: int) -> list[list[TensorInfo]]:
    """Split tensors, in order, into groups of at most `limit_bytes`; a larger tensor is a group of its own."""
    groups: list[list[TensorInfo]] = []
    room = 0
    for info in infos:
        if not groups or info.num_bytes > room:
            groups.append([])
            room = limit_bytes
        groups[-1].append(info)
        room -= info.num_bytes
    return groups


def plain_tensors(name: str, linear: QuantizedLinear, dtype: torch.dtype) -> dict[str, Tensor]:
    """A quantized linear's weight as any program loads it: the grid points that its codes stand for, in `dtype`."""
    return {f"{name}.weight": linear.dequantized(dtype)}


def write_index(folder: Path, shards: Iterable[str]) -> None:
    """Write `model.safetensors.index.json` from the headers of the finished shards."""
    write_json(folder / INDEX_FILE, index_of(folder, shards))


def index_of(folder: Path, shards: Iterable[str]) -> dict:
    """What `model.safetensors.index.json` has to hold for some shards: `weight_map`, and `total_size` in `metadata`."""
    weight_map, total_bytes = {}, 0
    for shard in shards:
        for name, info in read_header(folder / shard).items():
            weight_map[name] = shard
            total_bytes += info.num_bytes
    return {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}


def write_config(source: Path, folder: Path, dtype: torch.dtype, **more: object) -> None:
    """Copy config.json with further entries, saying in which dtype the weights are to be loaded."""
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)
    write_json(folder / "config.json", config | {"dtype": str(dtype).removeprefix("torch.")} | more)


def copy_companions(source: Path, folder: Path) -> list[Path]:
    """Copy the tokenizer and the other small files that a checkpoint needs to load and generate; give the copies."""
    copies = []
    for pattern in COPIED_PATTERNS:
        for file in sorted(path for path in source.glob(pattern) if path.is_file()):
            write_whole(folder / file.name, partial(shutil.copyfile, inside(source, file.name)))
            copies.append(folder / file.name)
    return copies
