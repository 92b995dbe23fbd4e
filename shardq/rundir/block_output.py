"""A finished block's files, and those that complete a run."""

from collections.abc import Callable, Container
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from shardq.background import lookahead, one_by_one
from shardq.formats import encodings
from shardq.formats.block_file import Linears, write_block
from shardq.formats.checkpoint import copy_companions, write_config, write_index
from shardq.formats.tensor_file import write_tensors
from shardq.model.block import BlockPlan
from shardq.model.skeleton import Skeleton
from shardq.quant.activation import ActivationGrid
from shardq.rundir.encodings import merge_encodings
from shardq.rundir.folder import RunFolder
from shardq.rundir.plan import Plan

WriteShard = Callable[[Path, Linears, dict[str, ActivationGrid]], None]
"""Writes a block's shard, which appears whole, from its linears and grids of activations by full name."""


def rounding_to(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Function that rounds a float32 weight to what a dtype can hold, and keeps it in float32."""
    return lambda weight: weight.to(dtype).to(weight.dtype)


def write_block_files(
    output: Path,
    plan: Plan,
    block: BlockPlan,
    linears: Linears,
    activations: dict[str, ActivationGrid],
    write_shard: WriteShard,
    device: torch.device,
    has_codes: bool = False,
) -> list[Path]:
    """Write a block's codes, encodings and shard; each file appears whole.

    Args:
        linears, activations: linears and grids of activations, by full name.
        device: the device that computed them; with a GPU the files are written at the same time.
        has_codes: whether the file of codes is there.

    Returns:
        The files.
    """
    folder = RunFolder(output)
    writers: dict[Path, Callable[[Path], None]] = {}
    if not has_codes:
        writers[folder.block(block.index)] = lambda path: write_block(path, linears, activations)
    for version in plan.encoding_versions:
        path = folder.encodings(version, block.index)
        writers[path] = partial(encodings.write, version=version, linears=linears, grids=activations)
    writers[output / plan.block_shard(block.index)] = lambda path: write_shard(path, linears, activations)
    # With a CPU one after the other: its cores compute the tensors, and a background thread would have only one core.
    at_once = partial(lookahead, threads=len(writers)) if device.type == "cuda" else one_by_one
    written = [path for path, _ in at_once(lambda path: writers[path](path), writers)]
    return [folder.block(block.index), *written] if has_codes else written


def write_run_files(
    output: Path, skeleton: Skeleton, plan: Plan, dtype: torch.dtype, scheme: dict, kept: Container[Path] = ()
) -> list[Path]:
    """Write the files that complete the checkpoint: tensors outside the blocks, index, config, tokenizer, encodings.

    Args:
        dtype: dtype of the model that programs build from the checkpoint.
        scheme: the entry `quantization_config` of config.json; empty for plain weights.
        kept: large files that exist and stay.

    Returns:
        The files whose digests complete the ledger.
    """
    folder = RunFolder(output)
    rest = {output / plan.rest_shard(number): tensors for number, tensors in enumerate(plan.rest)}
    for path, tensors in rest.items():
        if path not in kept:
            plain = {tensor.name: skeleton.source.read_plain(tensor) for tensor in tensors}
            write_tensors(path, plain, {"format": "pt"})
    merged = {folder.encodings(version): version for version in plan.encoding_versions}
    for path, version in merged.items():
        if path not in kept:
            merge_encodings(output, version, output, plan.num_blocks)
    copies = copy_companions(skeleton.folder, output)
    write_config(skeleton.folder, output, dtype, scheme)
    write_index(output, plan.shards())
    return [*rest, *merged, *copies, folder.config, folder.index]
