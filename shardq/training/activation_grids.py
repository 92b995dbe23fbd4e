"""Grids of a block's activations: which activations have one, finding it from samples, and rounding a block to it."""

from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from shardq.errors import QuantizationError, UnsupportedModelError
from shardq.formats.block_file import read_activations
from shardq.model.block import BlockPlan
from shardq.model.skeleton import Skeleton
from shardq.model.taps import activation_names, tapped
from shardq.parallel.collectives import reduce_over_ranks
from shardq.parallel.ranks import Ranks
from shardq.quant.activation import ActivationGrid, ActivationLevels, rounded
from shardq.quant.observers import REDUCTIONS, WITH_COUNTS, Statistics, no_statistics, observed_grid, statistics_of
from shardq.quant.options import ActivationOptions
from shardq.rundir.folder import RunFolder
from shardq.rundir.plan import Plan

KEPT = (".key", ".value")  # the activations in a KV cache


def plan_activations(skeleton: Skeleton, plan: Plan, length: int, options: ActivationOptions) -> Plan:
    """The plan with the grids that are asked for of each block's activations.

    Args:
        plan: with the blocks' arguments, for sequences of `length` tokens.

    Raises:
        UnsupportedModelError: keys and values are asked for, and the model's attention does not show them.
    """
    if not options.asked:
        return plan
    planned = []
    for block in plan.blocks:
        names = activation_names(skeleton.blocks[block.index], block.arguments, (1, length, block.arguments.width))
        if options.kv_bits and not any(name.endswith(KEPT) for name in names):
            raise UnsupportedModelError(
                f"{type(skeleton.model).__name__}: its attention is code of its own, beside transformers' attention "
                "interface, so keys and values cannot be reached; leave out activations.kv_bits"
            )
        grids = {
            name: ActivationLevels(bits=bits, symmetric=options.symmetric, scale_dtype=plan.scale_dtype)
            for name, bits in _bits_of(names, block, options).items()
        }
        planned.append(replace(block, activations=grids))
    return replace(plan, blocks=planned)


def _bits_of(names: list[str], block: BlockPlan, options: ActivationOptions) -> dict[str, int]:
    inputs = {matrix.input for matrix in block.grids}
    bits: dict[str, int] = {}
    for name in names:
        if options.kv_bits and name.endswith(KEPT):
            bits[name] = options.kv_bits
        elif options.bits and (options.tensors == "all" or name in inputs):
            bits[name] = options.bits
    return bits


@contextmanager
def observed(block: nn.Module, asked: Collection[str], options: ActivationOptions) -> Iterator[dict[str, Statistics]]:
    """Collect statistics of a block's named activations while it computes within the body.

    Yields:
        by name, this rank's statistics; nothing where each token has a grid of its own.
    """
    if not asked or options.granularity == "token":
        yield {}
        return
    device, with_counts = next(block.parameters()).device, options.observer in WITH_COUNTS
    statistics = {name: no_statistics(device, with_counts) for name in asked}

    def look(name: str, values: Tensor) -> Tensor:
        statistics[name].merge(statistics_of(values, with_counts))
        return values

    with tapped(block, look, statistics.__contains__):
        yield statistics


def activation_grids(
    statistics: dict[str, Statistics],
    asked: dict[str, ActivationLevels],
    options: ActivationOptions,
    ranks: Ranks,
) -> dict[str, ActivationGrid]:
    """The grids that all ranks' statistics make together, the same on every rank.

    Args:
        asked: the plan's grids of the activations for which there are statistics.

    Raises:
        QuantizationError: an activation is not finite, or no sample reached it.
    """
    if options.granularity == "token":
        return {name: ActivationGrid(levels.bits, levels.symmetric) for name, levels in asked.items()}
    for wanted in ("min", "max", "sum"):
        fields = [field for field, reduction in REDUCTIONS.items() if reduction == wanted]
        tensors = [getattr(found, field) for found in statistics.values() for field in fields]
        reduce_over_ranks(ranks, tensors, wanted)
    grids = {}
    for name, found in statistics.items():
        grids[name] = observed_grid(found, asked[name], options)
        if grids[name] is None:
            error = QuantizationError(
                f"{name}: its values are not finite, or no sample reached it; check the model's activations for "
                "overflow, or give more calibration samples"
            )
            error.agreed = True  # every rank has the same statistics
            raise error
    return grids


def written_grids(folder: Path, block: BlockPlan) -> dict[str, ActivationGrid]:
    """The grids of a finished block's activations, by name within the block."""
    grids = read_activations(RunFolder(folder).block(block.index))
    return {name.removeprefix(f"{block.name}."): grid for name, grid in grids.items()}


def simulated(block: nn.Module, grids: dict[str, ActivationGrid]) -> AbstractContextManager:
    """While the body runs, a block's activations are rounded to their grids, by name within the block."""
    return tapped(block, lambda name, values: rounded(values, grids[name]), grids.__contains__)
