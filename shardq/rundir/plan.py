"""What a run will do, checked against the model before any work."""

from dataclasses import dataclass

from shardq.config import QuantOptions
from shardq.errors import ConfigError
from shardq.formats import encodings
from shardq.formats.checkpoint import group_by_size, shard_name
from shardq.formats.shards import TensorInfo
from shardq.formats.source import SourceTensor, stored_in
from shardq.model.skeleton import Skeleton, linears_to_quantize

ENCODINGS: tuple[encodings.Version, ...] = ("1.0.0", "0.6.1")  # AIMET's default, and what its load_encodings reads
REST_SHARD_BYTES = 1 << 30  # tensors outside the blocks are copied in files of about this size


@dataclass(frozen=True)
class Plan:
    """The blocks, what is quantized in each, and the files that come out.

    Attributes:
        names: each block's name in the checkpoint.
        linears: for each block, names within it of the linears to quantize.
        rest: the stored tensors outside the blocks, and those of a block that its code does not use, in groups of one
            file.
        num_scales: of all linears together.
    """

    names: list[str]
    linears: list[list[str]]
    rest: list[list[TensorInfo]]
    num_scales: int

    @property
    def num_blocks(self) -> int:
        """Decoder blocks of the model."""
        return len(self.names)

    @property
    def num_shards(self) -> int:
        """Files of the output checkpoint: one a block, then the rest."""
        return self.num_blocks + len(self.rest)

    @property
    def encoding_versions(self) -> list[encodings.Version]:
        """Versions of AIMET encodings that the run writes: those whose file a program can be expected to load."""
        return [version for version in ENCODINGS if encodings.fits(version, self.num_scales)]

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
    """Decide what is quantized and where it goes.

    Raises:
        ConfigError: the group size does not divide a linear's input size, or a pattern to ignore matches nothing.
        UnsupportedModelError: no linear would be quantized.
    """
    linears = linears_to_quantize(skeleton, quant.ignored)
    _check_group_size(skeleton, linears, quant.spec.group_size)
    num_scales = sum(
        linear.out_features * (linear.in_features // (quant.spec.group_size or linear.in_features))
        for block, names in zip(skeleton.blocks, linears, strict=True)
        for linear in map(block.get_submodule, names)
    )
    rest = group_by_size(stored_in(outside_blocks(skeleton)), REST_SHARD_BYTES)
    return Plan(skeleton.names, linears, rest, num_scales)


def outside_blocks(skeleton: Skeleton) -> list[SourceTensor]:
    """The source's tensors that are only copied: those of no block, or that a block's code does not use."""
    numbers = range(len(skeleton.blocks))
    in_blocks = {tensor.name for number in numbers for tensor in skeleton.block_tensors(number).values()}
    return [tensor for name, tensor in skeleton.source.tensors.items() if name not in in_blocks]


def _check_group_size(skeleton: Skeleton, linears: list[list[str]], group_size: int | None) -> None:
    if group_size is None:
        return
    for block_name, block, names in zip(skeleton.names, skeleton.blocks, linears, strict=True):
        for name in names:
            in_features = block.get_submodule(name).in_features
            if in_features % group_size:
                raise ConfigError(
                    f"quant.group_size: {group_size} does not divide the {in_features} input channels of "
                    f"{block_name}.{name}; choose a divisor, or -1 for per-channel"
                )
