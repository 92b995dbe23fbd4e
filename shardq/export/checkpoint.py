"""A run as a checkpoint that programs load: a shard of each block, from its codes, and the files that complete it."""

import shutil
from abc import abstractmethod
from collections.abc import Container, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from shardq.errors import ConfigError
from shardq.export.base import Format, Grids
from shardq.files import write_whole
from shardq.formats.block_file import read_activations, read_block, read_grids
from shardq.formats.checkpoint import copy_companions, write_config, write_index
from shardq.formats.shards import DTYPES, read_header, read_tensor
from shardq.formats.source import SourceTensor, as_stored, read_stored, values_of
from shardq.formats.tensor_file import check_finite, write_tensors
from shardq.logs import Display
from shardq.matrix import is_linear
from shardq.model.layout import tensor_in
from shardq.model.skeleton import Skeleton
from shardq.quant.activation import ActivationGrid
from shardq.quant.grid import Grid
from shardq.quant.quantized import QuantizedLinear
from shardq.rundir.folder import RunFolder
from shardq.rundir.room import code_bytes

LOAD_PLAIN = 'AutoModelForCausalLM.from_pretrained("path/to/this/folder")'


class Checkpoint(Format):
    """A format that has a shard of each block, which a run writes as it goes on."""

    @abstractmethod
    def linear_tensors(
        self, name: str, linear: QuantizedLinear, dtype: torch.dtype, entering: ActivationGrid | None
    ) -> dict[str, Tensor]:
        """The tensors, by full name, that a linear's weight becomes.

        Args:
            dtype: dtype in which programs load the checkpoint.
            entering: the grid of the linear's input, if the format asks for one and the run has it.
        """

    def described(self, skeleton: Skeleton, grids: Grids, ignored: Iterable[str]) -> dict:
        """The entry `quantization_config` of config.json; empty for plain weights.

        Args:
            skeleton: skeleton of the run's result.
            ignored: names of the linears that are not quantized.

        Raises:
            ConfigError: the run has other grids for the linears' inputs than the format asks for.
        """
        return {}

    def weight_dtype(self, skeleton: Skeleton, grid: Grid) -> torch.dtype:
        """Dtype of the model that programs build from the checkpoint, which is also that of its scales."""
        return model_dtype(skeleton, grid)

    def matrix_bytes(self, shape: tuple[int, ...], grid: Grid, itemsize: int) -> int:
        return code_bytes(shape, grid)

    def write_shard(self, run: Path, skeleton: Skeleton, block_index: int, path: Path) -> None:
        """Write a block's shard, after the run's own files of the block; it appears whole.

        Args:
            run: folder of the run, whose shard of the block has the same name.
            skeleton: skeleton of the run's source or of its result.

        Raises:
            ConfigError: as `described`.
            QuantizationError: a weight or a scale is beyond the dtype that the format keeps it in.
        """
        codes = read_block(RunFolder(run).block(block_index))
        linears = {skeleton.tensor(f"{name}.weight").name: linear for name, linear in codes.items()}
        inputs = input_grids(self, run, skeleton, block_index)
        tensors: dict[str, Tensor] = {}
        for tensor in _apart(run / path.name, skeleton, block_index):
            name = tensor.name
            if name not in linears:
                tensors[name] = values_of(tensor, read_stored)
                continue
            linear, bare_name = linears[name], name.removesuffix(".weight")
            dtype = self.weight_dtype(skeleton, linear.grid)
            if self.rounded_by:
                linear = replace(linear, scale_OG=linear.scale_OG.to(dtype).float())
            of_linear = self.linear_tensors(bare_name, linear, dtype, inputs.get(bare_name))
            check_finite(path, of_linear)
            tensors |= of_linear
        write_tensors(path, tensors, {"format": "pt"})

    def write(self, skeleton: Skeleton, grids: Grids, folder: Path, display: Display, is_begun: bool) -> float:
        described = self.described(skeleton, grids, _linears_left(skeleton, grids))
        shards = sorted({info.file.name for info in skeleton.source.index.values()})
        for number, shard in enumerate(shards):
            if is_begun and (folder / shard).exists():
                continue
            if number < len(skeleton.names):
                self.write_shard(skeleton.folder, skeleton, number, folder / shard)
            else:  # outside the blocks nothing is quantized
                write_whole(folder / shard, partial(shutil.copyfile, skeleton.folder / shard))
        write_index(folder, shards)
        copy_companions(skeleton.folder, folder)
        dtype = self.weight_dtype(skeleton, next(iter(grids.values())))  # all grids keep scales in the same one
        write_config(skeleton.folder, folder, dtype, **({"quantization_config": described} if described else {}))
        return _scale_change(skeleton, dtype) if self.rounded_by else 0.0


def _apart(shard: Path, skeleton: Skeleton, block_index: int) -> list[SourceTensor]:
    """The tensors of a block in a run's shard; those that the source joins, such as fused experts, as their parts."""
    written = {name: as_stored(info) for name, info in read_header(shard).items()}
    tensors = {}
    for inner, like in skeleton.block_tensors(block_index).items():
        pieces = skeleton.layout[f"{skeleton.names[block_index]}.{inner}"]
        tensors[like.name] = tensor_in(written, like.name, like.shape, pieces)
    return list(tensors.values())


def in_transformers(package: str, load: str) -> str:
    """How transformers loads a checkpoint, as Markdown that continues a sentence."""
    return f"with `pip install {package}`, in transformers:\n\n```python\n{load}\n```"


def with_vllm(otherwise: str) -> str:
    """How vLLM serves a checkpoint, or else another program, as Markdown that continues a sentence."""
    return f"```bash\nvllm serve path/to/this/folder\n```\n\nor, {otherwise}"


def input_grids(chosen: Format, run: Path, skeleton: Skeleton, block_index: int) -> dict[str, ActivationGrid]:
    """The 8-bit grids of a block's linears' inputs, by the linears' names in the checkpoint, if asked for.

    Raises:
        ConfigError: the block has other grids.
    """
    grids: dict[str, ActivationGrid] = {}
    path = RunFolder(run).block(block_index)
    if chosen.activation_bits == 16:
        return grids
    activations = read_activations(path)
    for name in read_grids(path):
        grid = activations.get(f"{name}.input")
        if grid is None:
            continue
        if grid.bits != chosen.activation_bits:
            raise ConfigError(
                f"activation_bits: 8, but the run has grids of {grid.bits} bits for what enters {name}; "
                "quantize with --activations.bits 8, or export with --activation_bits 16"
            )
        grids[skeleton.tensor(f"{name}.weight").name.removesuffix(".weight")] = grid
    return grids


def _scale_change(skeleton: Skeleton, dtype: torch.dtype) -> float:
    """The largest relative change of a scale of a run by rounding it to a dtype."""
    largest = 0.0
    for number in range(len(skeleton.names)):
        for name, info in read_header(RunFolder(skeleton.folder).block(number)).items():
            if name.endswith(".scale"):
                scale_OG = read_tensor(info)
                largest = max(largest, (scale_OG.to(dtype).float() / scale_OG - 1).abs().max().item())
    return largest


def _linears_left(skeleton: Skeleton, quantized: Container[str]) -> set[str]:
    """Names of the linears that are not quantized, the model's and, where it differs, the checkpoint's.

    Any other stored matrix counts as a linear, except embeddings: a program may build linears where transformers builds
    others (routers) or none (layers that predict further tokens, parts for images), and would expect packed ones.
    """
    modules = dict(skeleton.model.named_modules())
    for block_name, block in skeleton.named_blocks.items():
        modules |= {f"{block_name}.{name}": module for name, module in block.named_modules()}
    left = {name for name, module in modules.items() if is_linear(module) and name not in quantized}
    others = {
        skeleton.tensor(f"{name}.weight").name
        for name, module in modules.items()
        if name in quantized or isinstance(module, nn.Embedding)
    }
    matrices = {
        name for name, tensor in skeleton.source.tensors.items() if name.endswith(".weight") and len(tensor.shape) == 2
    }
    return left | {name.removesuffix(".weight") for name in matrices - others}


def model_dtype(skeleton: Skeleton, grid: Grid) -> torch.dtype:
    """Dtype to which a target rounds scales, or else the source's dtype, that of the embeddings, which a run copies."""
    if grid.kept_dtype:
        return grid.kept_dtype
    table = skeleton.model.get_input_embeddings()
    name = next(name for name, module in skeleton.model.named_modules() if module is table)
    return DTYPES[skeleton.tensor(f"{name}.weight").dtype]
