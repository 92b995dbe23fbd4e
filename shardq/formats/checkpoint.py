"""The output checkpoint: shard names, index, config and the files copied beside them."""

import json
import shutil
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from shardq.errors import CheckpointError
from shardq.files import ASIDE, storage_errors, write_json, write_whole
from shardq.formats.config_file import SCHEME, without_scheme
from shardq.formats.shards import INDEX_FILE, inside, read_header
from shardq.formats.source import SourceTensor
from shardq.quant.quantized import QuantizedLinear

# What loads, prompts or licenses a model, beside config.json and weights; case counts, as in the hub's own patterns.
COMPANIONS = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "tekken.json", "vocab*", "merges.txt", "bpe.codes",
    "dict.txt", "*.model", "*.spm", "*.tiktoken",
    "*.jinja", "chat_template*", "additional_chat_templates/*.jinja",
    "generation_config.json", "*processor_config.json", "image_processor*", "spk_dict.pt",
    "*.py",  # a model's own code: config.json names one file, which may import any other
    "*LICEN[CS]E*", "*[Ll]icen[cs]e*", "COPYING*", "*NOTICE*", "*Notice*", "*USE_POLICY*",
)  # fmt: skip
NO_COMPANIONS = (".safetensors", ".bin", ".pth", ".gguf", ".onnx", ".h5", ".msgpack", ASIDE)


def shard_name(number: int, total: int) -> str:
    """File name of shard `number` (from 1) of `total`, as transformers writes them."""
    return f"model-{number:05d}-of-{total:05d}.safetensors"


def group_by_size(tensors: Iterable[SourceTensor], limit_bytes: int) -> list[list[SourceTensor]]:
    """Split tensors, in order, into groups of at most `limit_bytes`; a larger tensor is a group of its own."""
    groups: list[list[SourceTensor]] = []
    room = 0
    for tensor in tensors:
        if not groups or tensor.num_bytes > room:
            groups.append([])
            room = limit_bytes
        groups[-1].append(tensor)
        room -= tensor.num_bytes
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


def write_config(source: Path, folder: Path, dtype: torch.dtype, scheme: dict | None = None) -> None:
    """Copy config.json, saying in which dtype weights are loaded, and how they are quantized, not the source.

    Args:
        scheme: the entry `quantization_config`; empty for plain weights.
    """
    config = without_scheme(json.loads((source / "config.json").read_text(encoding="utf-8")))
    config.pop("torch_dtype", None)
    config |= {"dtype": str(dtype).removeprefix("torch.")} | ({SCHEME: scheme} if scheme else {})
    write_json(folder / "config.json", config)


def companions(folder: Path) -> list[Path]:
    """The small files that a checkpoint needs to load and generate, and its licence; relative to its folder.

    Raises:
        CheckpointError: one of them is a link out of the folder, or to nothing.
        StorageError: one cannot be read.
    """
    found = {path.relative_to(folder) for pattern in COMPANIONS for path in folder.glob(pattern) if not path.is_dir()}
    names = sorted(name for name in found if name.suffix not in NO_COMPANIONS)
    for name in names:
        if not inside(folder, str(name)).exists():
            raise CheckpointError(f"{folder / name}: a link to nothing; restore the file or download it again")
        with storage_errors(folder / name, "read"), open(folder / name, "rb"):
            pass
    return names


def copy_companions(source: Path, folder: Path) -> list[Path]:
    """Copy a checkpoint's companions; give the copies; raises as `companions`."""
    names = companions(source)
    for name in names:
        write_whole(folder / name, partial(shutil.copyfile, source / name))
    return [folder / name for name in names]
