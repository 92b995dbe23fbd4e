"""Files that make a finished block, and a finished run, usable by others."""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from shardq.formats import encodings
from shardq.formats.block_file import write_block
from shardq.formats.checkpoint import copy_companions, write_config, write_index
from shardq.formats.shards import DTYPES, read_tensor
from shardq.formats.tensor_file import write_tensors
from shardq.model.skeleton import Skeleton
from shardq.pipeline.plan import Plan, block_file, encodings_files
from shardq.quant.quantized import QuantizedLinear


def stored_dtype(skeleton: Skeleton, plan: Plan, option: str) -> torch.dtype:
    """Dtype of the quantized linears' weights in the output checkpoint."""
    if option == "float32":
        return torch.float32
    block_index = next(number for number, names in enumerate(plan.linears) if names)
    name = f"{plan.names[block_index]}.{plan.linears[block_index][0]}.weight"
    return DTYPES[skeleton.stored(name).dtype]


def rounding_to(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Function that rounds a float32 weight to what a dtype can hold, and keeps it in float32."""
    return lambda weight: weight.to(dtype).to(weight.dtype)


def write_block_files(
    output: Path,
    skeleton: Skeleton,
    plan: Plan,
    block_index: int,
    linears: dict[str, QuantizedLinear],
    dtype: torch.dtype,
) -> list[Path]:
    """Write a block's codes, encodings and weights; each file appears whole.

    Args:
        linears: by name within the block.

    Returns:
        The files.
    """
    prefix = plan.names[block_index]
    full = {f"{prefix}.{name}": linear for name, linear in linears.items()}
    codes_file = block_file(output, block_index)
    v1_file, torch_file = encodings_files(output, block_index)
    weights_file = output / plan.block_shard(block_index)
    write_block(codes_file, full)
    encodings.write_v1(v1_file, (encodings.encoding_v1(f"{name}.weight", linear) for name, linear in full.items()))
    encodings.write_torch(
        torch_file, ((f"{name}.weight", encodings.encoding_torch(linear)) for name, linear in full.items())
    )
    weights = {}
    for name, info in skeleton.block_tensors(block_index).items():
        linear = linears.get(name.removesuffix(".weight"))
        is_codes = linear is not None and name.endswith(".weight")
        weights[info.name] = linear.dequantized().to(dtype) if is_codes else read_tensor(info)
    write_tensors(weights_file, weights, {"format": "pt"})
    return [codes_file, v1_file, torch_file, weights_file]


def write_run_files(output: Path, skeleton: Skeleton, plan: Plan, dtype: torch.dtype) -> list[Path]:
    """Write what completes the checkpoint: tensors outside the blocks, index, config, tokenizer, merged encodings.

    Returns:
        The files whose digests complete the ledger.
    """
    rest = []
    for number, infos in enumerate(plan.rest):
        rest.append(output / plan.rest_shard(number))
        write_tensors(rest[-1], {info.name: read_tensor(info) for info in infos}, {"format": "pt"})
    v1_file, torch_file = output / "model.encodings", output / "model_torch.encodings"
    encodings.write_v1(v1_file, _merged(output, plan, 0, encodings.read_v1))
    encodings.write_torch(torch_file, _merged(output, plan, 1, encodings.read_torch))
    copy_companions(skeleton.folder, output)
    write_config(skeleton.folder, output, str(dtype).removeprefix("torch."))
    write_index(output, plan.shards())
    return [*rest, v1_file, torch_file, output / "config.json", output / "model.safetensors.index.json"]


def _merged(output: Path, plan: Plan, which: int, read: Callable[[Path], Iterator]) -> Iterator:
    for block_index in range(plan.num_blocks):
        yield from read(encodings_files(output, block_index)[which])
