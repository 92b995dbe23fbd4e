"""The plan of a run, checked against the model before any work."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from shardq.config import DEFAULT_GROUP_SIZES, QuantOptions
from shardq.errors import ConfigError
from shardq.formats import encodings
from shardq.formats.checkpoint import group_by_size, shard_name
from shardq.formats.source import SourceTensor
from shardq.model.arguments import BlockArguments
from shardq.model.block import BlockPlan, block_plans
from shardq.model.choice import matrices_to_quantize
from shardq.model.skeleton import Skeleton
from shardq.quant.grid import Grid

ENCODINGS: tuple[encodings.Version, ...] = ("1.0.0", "0.6.1")  # AIMET's default, and what its load_encodings reads
REST_SHARD_BYTES = 1 << 30  # tensors outside the blocks are copied in files of about this size


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The plans of the blocks, and the files of the output.

    Attributes:
        blocks: the block plans, in order.
        rest: the tensors outside the blocks, and those of a block that its code does not use, in groups of one file.
        scale_dtype: name of the dtype in which the target keeps scales; None: float32.
        has_encodings: whether AIMET encodings are written; they belong to plain weights, and may be larger than packed.
    """

    blocks: list[BlockPlan]
    rest: list[list[SourceTensor]]
    scale_dtype: str | None = None
    has_encodings: bool = True

    @property
    def num_blocks(self) -> int:
        """Decoder blocks of the model."""
        return len(self.blocks)

    @property
    def grids(self) -> dict[str, Grid]:
        """The grid of every matrix that is quantized, by its name in the model."""
        return {block.full_name(matrix): grid for block in self.blocks for matrix, grid in block.grids.items()}

    @property
    def num_matrices(self) -> int:
        """Number of matrices that are quantized."""
        return sum(len(block.grids) for block in self.blocks)

    @property
    def num_scales(self) -> int:
        """Number of scales of all matrices."""
        return sum(block.num_scales for block in self.blocks)

    @property
    def num_shards(self) -> int:
        """Files of the output checkpoint: one a block, then the rest."""
        return self.num_blocks + len(self.rest)

    @property
    def encoding_versions(self) -> list[encodings.Version]:
        """Versions of AIMET encodings that the run writes: those whose file a program can be expected to load."""
        return [version for version in ENCODINGS if self.has_encodings and encodings.fits(version, self.num_scales)]

    def with_scales_in(self, dtype: str) -> "Plan":
        """The same plan, with scales rounded to a dtype by name; raises the grids' ValueError where they cannot be."""
        blocks = [
            replace(block, grids={matrix: grid.with_scales_in(dtype) for matrix, grid in block.grids.items()})
            for block in self.blocks
        ]
        return replace(self, blocks=blocks, scale_dtype=dtype)

    def with_arguments(self, arguments: Sequence[BlockArguments]) -> "Plan":
        """The same plan, with each block's arguments."""
        pairs = zip(self.blocks, arguments, strict=True)
        return replace(self, blocks=[replace(block, arguments=passed) for block, passed in pairs])

    def block_shard(self, block_index: int) -> str:
        """File name of a block's weights."""
        return shard_name(block_index + 1, self.num_shards)

    def rest_shard(self, number: int) -> str:
        """File name of group `number` of the rest."""
        return shard_name(self.num_blocks + number + 1, self.num_shards)

    def shards(self) -> list[str]:
        """All file names, in order."""
        return [shard_name(number, self.num_shards) for number in range(1, self.num_shards + 1)]


def make_plan(skeleton: Skeleton, quant: QuantOptions) -> Plan:
    """Decide what is quantized, on which grids, and where it goes.

    Raises:
        ConfigError: the group size does not divide a matrix' input size, or a pattern to ignore matches nothing.
        UnsupportedModelError: no matrix would be quantized.
    """
    chosen = matrices_to_quantize(skeleton, quant.ignored)
    grid = replace(quant, group_size=group_size_of(skeleton, quant)).grid
    blocks = block_plans(skeleton, [dict.fromkeys(matrices, grid) for matrices in chosen])
    for block in blocks:
        _check_group_sizes(block)
    return Plan(blocks=blocks, rest=group_by_size(outside_blocks(skeleton), REST_SHARD_BYTES))


def group_size_of(skeleton: Skeleton, quant: QuantOptions) -> int:
    """The group size that is asked for, or the default one of the model; -1: per-channel; raises as `make_plan`."""
    if quant.group_size is not None:
        return quant.group_size
    chosen = matrices_to_quantize(skeleton, quant.ignored)
    widths = {matrix.shape[1] for matrices in chosen for matrix in matrices}
    return next((size for size in DEFAULT_GROUP_SIZES if not any(width % size for width in widths)), -1)


def outside_blocks(skeleton: Skeleton) -> list[SourceTensor]:
    """The source's tensors that are only copied: those of no block, or that a block's code does not use."""
    return [tensor for name, tensor in skeleton.source.tensors.items() if name not in skeleton.users]


def _check_group_sizes(block: BlockPlan) -> None:
    for matrix, grid in block.grids.items():
        if not grid.divides(matrix.shape[1]):
            raise ConfigError(
                f"quant.group_size: {grid.group_size} does not divide the {matrix.shape[1]} input channels of "
                f"{block.full_name(matrix)}; choose a divisor, or -1 for per-channel, or leave it in float with "
                f"--quant.ignore {matrix.name}"
            )
