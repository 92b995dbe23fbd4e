"""One decoder block, from its weights and the activations that enter it to its quantized linears."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shardq.calib.partition import step_samples
from shardq.errors import QuantizationError
from shardq.logs import Display, Events
from shardq.lookahead import lookahead
from shardq.model.ends import BlockArguments, block_forward
from shardq.optimize.attach import attach, fold
from shardq.optimize.distill import distill
from shardq.optimize.inputs import generator_for, mixed
from shardq.optimize.loss import ErrorSums
from shardq.optimize.options import OptimizeOptions
from shardq.optimize.stepper import LocalStepper, Stepper
from shardq.parallel.allreduce_stepper import AllReduceStepper
from shardq.parallel.collectives import sum_over_ranks
from shardq.parallel.ranks import Ranks
from shardq.pipeline.passes import Activations, advance, compare
from shardq.quant.quantized import QuantizedLinear
from shardq.quant.spec import QuantSpec


@dataclass(frozen=True)
class BlockJob:
    """What quantizing a block needs beside the block, the same for all blocks of a run."""

    seed: int
    method: str
    spec: QuantSpec
    optimize: OptimizeOptions
    num_samples: int
    stored: Callable[[Tensor], Tensor]
    activations: Activations
    ranks: Ranks
    events: Events
    display: Display


@dataclass(frozen=True)
class BlockResult:
    """Quantized linears by name within the block, and the relative loss over all ranks' samples."""

    linears: dict[str, QuantizedLinear]
    loss_before: float
    loss_after: float


def quantize_block(
    job: BlockJob,
    block_index: int,
    block: nn.Module,
    linear_names: list[str],
    arguments: BlockArguments,
    is_last: bool,
) -> BlockResult:
    """Quantize one block in place; its next generation of both streams is in the store afterwards.

    The quantized stream is not written after the last block: nothing reads it.

    Raises:
        QuantizationError: a scale or the loss is not finite.
    """
    span, activations = job.events.span, job.activations
    forward = block_forward(block, arguments)
    # 1. The fp stream moves on: its output is the target now and the next block's input.
    with span("fp pass", block=block_index):
        advance(activations, "fp", block_index, forward)
    # 2. The block starts as round-to-nearest; how far is it off?
    attach(block, linear_names, job.spec, job.method)
    loss_before = None
    if linear_names and job.method != "rtn":
        with span("loss before", block=block_index):
            loss_before = _agreed_loss(job, block_index, compare(activations, block_index, forward, keep=False))
        # 3. Train its quantizers.
        with span("train", block=block_index, iterations=job.optimize.iterations):
            batches = _training_batches(job, block_index)
            distill(forward, _make_stepper(job, block), batches, job.display.advance_iteration)
    # 4. Fold them into codes and grid.
    with span("fold", block=block_index):
        linears = fold(block, linear_names, job.stored)
    # 5. The quantized stream moves on through the weights as they are served.
    with span("quant pass", block=block_index):
        loss_after = _agreed_loss(job, block_index, compare(activations, block_index, forward, keep=not is_last))
    return BlockResult(linears, loss_after if loss_before is None else loss_before, loss_after)


def _make_stepper(job: BlockJob, block: nn.Module) -> Stepper:
    if job.ranks.world_size == 1:
        return LocalStepper(block, job.optimize)
    return AllReduceStepper(block, job.optimize, job.ranks)


def _training_batches(job: BlockJob, block_index: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets [N, T, D] of this rank, one pair an iteration, each prepared during the one before."""
    activations, optimize = job.activations, job.optimize

    def load(step: tuple[int, list[int]]) -> tuple[Tensor, Tensor]:
        iteration, samples = step
        quant_NTD = activations.load("quant", block_index, samples)
        if optimize.fp_mix > 0:
            fp_NTD = activations.load("fp", block_index, samples)
            generators = [
                generator_for(activations.device, job.seed, block_index, iteration, sample) for sample in samples
            ]
            pairs = zip(quant_NTD, fp_NTD, generators, strict=True)
            quant_NTD = torch.stack([mixed(quant, fp, optimize.fp_mix, generator) for quant, fp, generator in pairs])
        return quant_NTD, activations.load("fp", block_index + 1, samples)

    steps = step_samples(
        job.num_samples, optimize.batch_size, optimize.iterations, job.ranks.rank, job.ranks.world_size
    )
    return (batch for _, batch in lookahead(load, steps))


def _agreed_loss(job: BlockJob, block_index: int, sums: ErrorSums) -> float:
    total = ErrorSums(*sum_over_ranks(job.ranks, [sums.squared_error, sums.target_power]))
    if not torch.isfinite(torch.tensor(total.relative_loss)):
        error = QuantizationError(
            f"block {block_index}: the loss is not finite; lower optimize.grid_lr and optimize.weight_lr, or check the "
            "model's activations for overflow"
        )
        error.agreed = True  # every rank has added up the same numbers
        raise error
    return total.relative_loss
