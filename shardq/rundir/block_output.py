"""A finished block's files, and those that complete a run."""

from collections.abc import Callable, Container, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from shardq.background import lookahead, one_by_one
from shardq.formats import encodings
from shardq.formats.block_file import write_block
from shardq.formats.checkpoint import copy_companions, write_config, write_index
from shardq.formats.shards import DTYPES
from shardq.formats.tensor_file import check_finite, write_tensors
from shardq.matrix import assembled
from shardq.model.block import BlockPlan
from shardq.model.layout import is_whole, put_together
from shardq.model.skeleton import Skeleton
from shardq.quant.activation import ActivationGrid
from shardq.quant.quantized import QuantizedLinear
from shardq.rundir.encodings import merge_encodings
from shardq.rundir.folder import RunFolder
from shardq.rundir.plan import Plan


def written_dtype(skeleton: Skeleton, plan: Plan, option: str) -> torch.dtype:
    """Dtype of the quantized weights in the output checkpoint."""
    if option == "float32":
        return torch.float32
    first = next(f"{block.name}.{matrix.tensor}" for block in plan.blocks for matrix in block.grids)
    return DTYPES[skeleton.tensor(first).dtype]


def rounding_to(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Function that rounds a float32 weight to what a dtype can hold, and keeps it in float32."""
    return lambda weight: weight.to(dtype).to(weight.dtype)


def write_block_files(
    output: Path,
    skeleton: Skeleton,
    plan: Plan,
    block: BlockPlan,
    linears: dict[str, QuantizedLinear],
    activations: dict[str, ActivationGrid],
    dtype: torch.dtype,
    device: torch.device,
) -> list[Path]:
    """Write a block's codes, encodings and weights; each file appears whole.

    Args:
        linears, activations: linears and grids of activations, by name within the block.
        device: the device that computed them; with a GPU the files are written at the same time.

    Returns:
        The files.
    """
    full = {block.full_name(matrix): linears[matrix.name] for matrix in block.grids}
    grids = {f"{block.name}.{name}": grid for name, grid in activations.items()}

    def write_weights(path: Path) -> None:
        quantized = assembled((matrix, linears[matrix.name].dequantized(dtype)) for matrix in block.grids)
        write_tensors(path, dict(_in_source_form(skeleton, block, path, quantized, dtype)), {"format": "pt"})

    folder = RunFolder(output)
    writers = {folder.block(block.index): lambda path: write_block(path, full, grids)}
    for version in plan.encoding_versions:
        path = folder.encodings(version, block.index)
        writers[path] = partial(encodings.write, version=version, linears=full, grids=grids)
    writers[output / plan.block_shard(block.index)] = write_weights
    # With a CPU one after the other: its cores compute the tensors, and a background thread would have only one core.
    at_once = partial(lookahead, threads=len(writers)) if device.type == "cuda" else one_by_one
    return [path for path, _ in at_once(lambda path: writers[path](path), writers)]


def _in_source_form(
    skeleton: Skeleton, block: BlockPlan, path: Path, quantized: dict[str, Tensor], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """A block's tensors as the source has them, by name, with quantized weights in their places.

    Args:
        path: the file that messages name.
        quantized: by name within the block; they are taken out.
    """
    source, tensors = skeleton.source, skeleton.block_tensors(block.index)
    for name, pieces in skeleton.stored_in_block(block.index).items():
        stored = source.tensors[name]
        is_quantized = not quantized.keys().isdisjoint(pieces)
        if not is_quantized and is_whole(next(iter(pieces.values())), stored):
            yield from ((info.name, source.read_stored(info)) for info in stored.stored)
            continue

        def value(inner: str, of_quantized: bool = is_quantized) -> Tensor:
            if inner in quantized:
                return quantized.pop(inner)
            return source.read(tensors[inner]).to(dtype) if of_quantized else source.read(tensors[inner])

        parts = ((piece.in_source, piece.in_model.of(value(inner))) for inner, piece in pieces.items())
        made = put_together(stored.shape, parts)
        check_finite(path, {name: made})
        yield name, made


def write_run_files(
    output: Path, skeleton: Skeleton, plan: Plan, dtype: torch.dtype, kept: Container[Path] = ()
) -> list[Path]:
    """Write the files that complete the checkpoint: tensors outside the blocks, index, config, tokenizer, encodings.

    Args:
        kept: large files that exist and stay.

    Returns:
        The files whose digests complete the ledger.
    """
    folder = RunFolder(output)
    rest = {output / plan.rest_shard(number): infos for number, infos in enumerate(plan.rest)}
    for path, infos in rest.items():
        if path not in kept:
            write_tensors(path, {info.name: skeleton.source.read_stored(info) for info in infos}, {"format": "pt"})
    merged = {folder.encodings(version): version for version in plan.encoding_versions}
    for path, version in merged.items():
        if path not in kept:
            merge_encodings(output, version, output, plan.num_blocks)
    copies = copy_companions(skeleton.folder, output)
    write_config(skeleton.folder, output, dtype)
    write_index(output, plan.shards())
    return [*rest, *merged, *copies, folder.config, folder.index]
