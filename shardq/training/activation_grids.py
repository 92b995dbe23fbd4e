"""Which activations of a block get a grid, how it is found from the calibration samples, and a block that has them."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from torch import Tensor, nn

from shardq.errors import QuantizationError, UnsupportedModelError
from shardq.formats.block_file import read_activations
from shardq.model.arguments import BlockArguments
from shardq.model.skeleton import Skeleton
from shardq.model.taps import activation_names, tapped
from shardq.parallel.collectives import reduce_over_ranks
from shardq.parallel.ranks import Ranks
from shardq.quant.activation import ActivationGrid, ActivationLevels, rounded
from shardq.quant.observers import REDUCTIONS, WITH_COUNTS, Statistics, no_statistics, observed_grid, statistics_of
from shardq.quant.options import ActivationOptions
from shardq.rundir.folder import RunFolder
from shardq.rundir.plan import Plan

KEPT = (".key", ".value")  # what a KV cache keeps


def plan_activations(
    skeleton: Skeleton, plan: Plan, arguments: list[BlockArguments], length: int, options: ActivationOptions
) -> list[dict[str, int]]:
    """For each block, the bits of the activations that get a grid, by name within the block, in the order of its code.

    Args:
        arguments: of each block, for sequences of `length` tokens.

    Raises:
        UnsupportedModelError: keys and values are asked for, and the model's attention does not show them.
    """
    if not options.asked:
        return [{} for _ in skeleton.blocks]
    chosen = []
    for block, linear_names, passed in zip(skeleton.blocks, plan.linears, arguments, strict=True):
        names = activation_names(block, passed, (1, length, passed.width))
        if options.kv_bits and not any(name.endswith(KEPT) for name in names):
            raise UnsupportedModelError(
                f"{type(skeleton.model).__name__}: its attention is code of its own, beside transformers' attention "
                "interface, so keys and values cannot be reached; leave out activations.kv_bits"
            )
        chosen.append(_chosen(names, linear_names, options))
    return chosen


def _chosen(names: list[str], linear_names: list[str], options: ActivationOptions) -> dict[str, int]:
    inputs = {f"{name}.input" for name in linear_names}
    bits: dict[str, int] = {}
    for name in names:
        if options.kv_bits and name.endswith(KEPT):
            bits[name] = options.kv_bits
        elif options.bits and (options.tensors == "all" or name in inputs):
            bits[name] = options.bits
    return bits


@contextmanager
def observed(block: nn.Module, bits: dict[str, int], options: ActivationOptions) -> Iterator[dict[str, Statistics]]:
    """Collect statistics of a block's named activations while it computes within the body.

    Yields:
        by name, this rank's statistics; nothing where each token has a grid of its own.
    """
    if not bits or options.granularity == "token":
        yield {}
        return
    device, with_counts = next(block.parameters()).device, options.observer in WITH_COUNTS
    statistics = {name: no_statistics(device, with_counts) for name in bits}

    def look(name: str, values: Tensor) -> Tensor:
        statistics[name].merge(statistics_of(values, with_counts))
        return values

    with tapped(block, look, statistics.__contains__):
        yield statistics


def activation_grids(
    statistics: dict[str, Statistics],
    bits: dict[str, int],
    options: ActivationOptions,
    scale_dtype: str | None,
    ranks: Ranks,
) -> dict[str, ActivationGrid]:
    """The grids that all ranks' statistics make together, the same on every rank.

    Args:
        scale_dtype: as in Grid.

    Raises:
        QuantizationError: an activation is not finite, or no sample reached it.
    """
    if options.granularity == "token":
        return {name: ActivationGrid(width, options.symmetric) for name, width in bits.items()}
    for wanted in ("min", "max", "sum"):
        fields = [field for field, reduction in REDUCTIONS.items() if reduction == wanted]
        tensors = [getattr(found, field) for found in statistics.values() for field in fields]
        reduce_over_ranks(ranks, tensors, wanted)
    grids = {}
    for name, found in statistics.items():
        spec = ActivationLevels(bits=bits[name], symmetric=options.symmetric, scale_dtype=scale_dtype)
        grids[name] = observed_grid(found, spec, options)
        if grids[name] is None:
            error = QuantizationError(
                f"{name}: its values are not finite, or no sample reached it; check the model's activations for "
                "overflow, or give more calibration samples"
            )
            error.agreed = True  # every rank has the same statistics
            raise error
    return grids


def written_grids(folder: Path, block_name: str, block_index: int) -> dict[str, ActivationGrid]:
    """The grids of a finished block's activations, by name within the block."""
    grids = read_activations(RunFolder(folder).block(block_index))
    return {name.removeprefix(f"{block_name}."): grid for name, grid in grids.items()}


def simulated(block: nn.Module, grids: dict[str, ActivationGrid]) -> AbstractContextManager:
    """While the body runs, a block's activations are rounded to their grids, by name within the block."""
    return tapped(block, lambda name, values: rounded(values, grids[name]), grids.__contains__)
