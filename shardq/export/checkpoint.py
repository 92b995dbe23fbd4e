"""A run as a checkpoint that programs load: a shard of each block, from its codes, and the files that complete it."""

import shutil
from abc import abstractmethod
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor, nn

from shardq.errors import ConfigError, UnsupportedModelError
from shardq.export.base import Format, Grids
from shardq.files import write_whole
from shardq.formats.block_file import Linears, LinearsInFiles, read_activations, read_block
from shardq.formats.checkpoint import write_config, write_index
from shardq.formats.shards import DTYPES, read_header, read_tensor
from shardq.formats.tensor_file import LARGE_BYTES, check_finite, write_one_by_one, write_tensors
from shardq.logs import Display
from shardq.matrix import is_linear, matrices_in
from shardq.model.layout import is_whole, put_together
from shardq.model.skeleton import Skeleton
from shardq.model.stacked import in_stack
from shardq.quant.activation import ActivationGrid
from shardq.quant.grid import Grid
from shardq.quant.quantized import QuantizedLinear
from shardq.rundir.folder import RunFolder
from shardq.rundir.room import code_bytes

VLLM_ALONE = """```bash
vllm serve path/to/this/folder
```

Transformers cannot load it: it joins no experts of this model that are stored one by one."""
LOAD_PLAIN = '{factory}.from_pretrained("path/to/this/folder")'


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

    def described(self, run: Path, skeleton: Skeleton, grids: Grids, ignored: Iterable[str]) -> dict:
        """The entry `quantization_config` of config.json; empty for plain weights.

        Args:
            run: folder of the run, with the files of all blocks.
            skeleton: skeleton of the run's source or of its result.
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

    def write_shard(
        self,
        path: Path,
        linears: Linears,
        activations: dict[str, ActivationGrid],
        *,
        skeleton: Skeleton,
        block_index: int,
    ) -> None:
        """Write a block's shard; it appears whole.

        Args:
            linears, activations: the block's linears and grids of activations, by full name.
            skeleton: skeleton of the run's source or of its result, which has the block's other tensors.

        Raises:
            ConfigError: as `described`.
            QuantizationError: a weight or a scale is beyond the dtype that the format keeps it in.
        """
        inputs, tensors = input_grids(self, linears, activations), skeleton.held_tensors(block_index)
        names = {name: f"{skeleton.names[block_index]}.{name}".removesuffix(".weight") for name in tensors}

        def make(name: str) -> dict[str, Tensor]:
            linear = linears[names[name]]
            dtype = self.weight_dtype(skeleton, linear.grid)
            if self.rounded_by:
                linear = replace(linear, scale_OG=linear.scale_OG.to(dtype).float())
            bare_name = tensors[name].name.removesuffix(".weight")
            made = self.linear_tensors(bare_name, linear, dtype, inputs.get(names[name]))
            check_finite(path, made)
            return made

        quantized = {name for name in tensors if names[name] in linears}
        laid_out = partial(_laid_out, skeleton, block_index, quantized, make)
        if isinstance(linears, LinearsInFiles) or sum(each.num_bytes for each in tensors.values()) > LARGE_BYTES:
            write_one_by_one(path, laid_out, {"format": "pt"})
        else:
            write_tensors(path, dict(laid_out()), {"format": "pt"})

    def write(self, skeleton: Skeleton, grids: Grids, folder: Path, display: Display, is_begun: bool) -> float:
        described = self.described(skeleton.folder, skeleton, grids, linears_left(skeleton, grids))
        shards = sorted({info.file.name for info in skeleton.source.index.values()})
        for number, shard in enumerate(shards):
            if is_begun and (folder / shard).exists():
                continue
            if number < len(skeleton.names):
                path = RunFolder(skeleton.folder).block(number)
                linears, activations = read_block(path), read_activations(path)
                self.write_shard(folder / shard, linears, activations, skeleton=skeleton, block_index=number)
            else:  # outside the blocks nothing is quantized
                write_whole(folder / shard, partial(shutil.copyfile, skeleton.folder / shard))
        write_index(folder, shards)
        dtype = self.weight_dtype(skeleton, next(iter(grids.values())))  # all grids keep scales in the same one
        write_config(skeleton.folder, folder, dtype, described)
        return _scale_change(skeleton, dtype) if self.rounded_by else 0.0


def check_linears(format_name: str, skeleton: Skeleton, grids: Grids) -> None:
    """Check that programs that read a packed format have a linear, with its weight [O, I], for each quantized one.

    Raises:
        UnsupportedModelError: naming one for which they have not.
    """
    for block_name, block in skeleton.named_blocks.items():
        for matrix in matrices_in(block):
            name = f"{block_name}.{matrix.name}"
            if name in grids and skeleton.is_transposed(f"{name}.weight"):
                what = "a Conv1D, stored [input, output channels]"
            elif name in grids and in_stack(block, matrix.name):
                what = "of experts that the model multiplies with as one stack"
            else:
                continue
            raise UnsupportedModelError(
                f"{format_name}: {name} is {what}, which programs do not read in this format; export hf"
            )


def _laid_out(
    skeleton: Skeleton, block_index: int, names: Container[str], make: Callable[[str], dict[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """A block's tensors by full name, as the source has them; a packed weight apart from those that it is stored with.

    Args:
        names: the weights that are quantized, by name within the block.
        make: makes the tensors that one of them becomes.
    """
    source, tensors, make = skeleton.source, skeleton.block_tensors(block_index), lru_cache(1)(make)
    for name, pieces in skeleton.held_pieces(block_index).items():
        stored, quantized = source.tensors[name], [inner for inner in pieces if inner in names]
        if not quantized and is_whole(next(iter(pieces.values())), stored):
            yield name, source.read_plain(stored)
        elif quantized and make(quantized[0]).keys() != {tensors[quantized[0]].name}:  # codes and scales
            for inner in pieces:
                yield from (
                    make(inner) if inner in names else {tensors[inner].name: source.read(tensors[inner])}
                ).items()
        else:
            dtype = make(quantized[0])[tensors[quantized[0]].name].dtype if quantized else None
            plain = (
                make(inner)[tensors[inner].name] if inner in names else source.read(tensors[inner]).to(dtype)
                for inner in pieces
            )
            parts = zip(pieces.values(), plain, strict=True)
            yield (
                name,
                put_together(stored.shape, ((piece.in_source, piece.in_model.of(part)) for piece, part in parts)),
            )


def in_transformers(package: str, load: str) -> str:
    """How transformers loads a checkpoint, as Markdown that continues a sentence."""
    return f"with `pip install {package}`, in transformers:\n\n```python\n{load}\n```"


def with_vllm(otherwise: str) -> str:
    """How vLLM serves a checkpoint, or else another program, as Markdown that continues a sentence."""
    return f"```bash\nvllm serve path/to/this/folder\n```\n\nor, {otherwise}"


def input_grids(
    chosen: Format, linears: Iterable[str], activations: dict[str, ActivationGrid]
) -> dict[str, ActivationGrid]:
    """The 8-bit grids of linears' inputs, by the linears' full names, if asked for.

    Args:
        activations: all grids of the linears' block, by full name.

    Raises:
        ConfigError: the block has other grids.
    """
    grids: dict[str, ActivationGrid] = {}
    if chosen.activation_bits == 16:
        return grids
    for name in linears:
        grid = activations.get(f"{name}.input")
        if grid is None:
            continue
        if grid.bits != chosen.activation_bits:
            raise ConfigError(
                f"activation_bits: 8, but the run has grids of {grid.bits} bits for what enters {name}; "
                "quantize with --activations.bits 8, or export with --activation_bits 16"
            )
        grids[name] = grid
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


def linears_left(skeleton: Skeleton, quantized: Container[str]) -> set[str]:
    """Names of the linears that are not quantized, the model's and, where it differs, the checkpoint's.

    Any other stored matrix counts as a linear, except embeddings: a program may build linears where transformers builds
    others (routers) or none (layers that predict further tokens, parts for images), and would expect packed ones.
    """
    modules = dict(skeleton.model.named_modules())
    for block_name, block in skeleton.named_blocks.items():
        modules |= {f"{block_name}.{name}": module for name, module in block.named_modules()}
    left = {name for name, module in modules.items() if is_linear(module) and name not in quantized}
    others = {
        piece.source
        for name, module in modules.items()
        if name in quantized or isinstance(module, nn.Embedding)
        for piece in skeleton.layout.get(f"{name}.weight", ())
    }
    matrices = {
        name for name, tensor in skeleton.source.tensors.items() if name.endswith(".weight") and len(tensor.shape) == 2
    }
    return left | {name.removesuffix(".weight") for name in matrices - others}


def model_dtype(skeleton: Skeleton, grid: Grid) -> torch.dtype:
    """Dtype to which a target rounds scales, or else the source's dtype, that of the embeddings, which a run copies."""
    if grid.kept_dtype:
        return grid.kept_dtype
    table = skeleton.embeddings
    name = next(name for name, module in skeleton.model.named_modules() if module is table)
    return DTYPES[skeleton.tensor(f"{name}.weight").dtype]
