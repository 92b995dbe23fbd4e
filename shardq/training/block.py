"""The steps of quantizing a decoder block: from its weights and input activations to quantized linears."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from shardq.model.block import LoadedBlock
from shardq.optimize.best_iterate import BestIterate
from shardq.optimize.channel_power import channel_power
from shardq.parallel.collectives import reduce_over_ranks, together
from shardq.quant.activation import ActivationGrid
from shardq.training.activation_grids import activation_grids, observed
from shardq.training.objective import objective_of
from shardq.training.passes import advance
from shardq.training.routing import expert_of, power_of_all_tokens, sampling, watched
from shardq.training.self_check import Check
from shardq.training.trainer import Job, served_forward, trainer_for
from shardq.training.tries import BlockInTraining, Start, agreed_loss

Grids = dict[str, ActivationGrid]
"""Grids of a block's activations, by name within the block."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What the fp stream shows of a block.

    Attributes:
        power: the mean square of each input channel, by matrix, where the start range is searched.
        grids: the grids of the activations that are rounded in training.
        starved: names of the routed experts that too few tokens reached, with the number of their tokens.
    """

    power: dict[str, Tensor]
    grids: Grids
    starved: dict[str, int]


def float_pass(job: Job, loaded: LoadedBlock, check: Check) -> Seen:
    """Move the fp stream on through a block: its output is the block's target now and the next block's input.

    Args:
        check: compares the block's output with the model's own.
    """
    plan, recipe = loaded.plan, job.recipe
    stride = sampling(job.num_samples, job.activations.sequence_length)
    searched = plan.grids if recipe.optimize.start == "search" else ()
    rounded = plan.activations if recipe.activations.in_training else {}
    with job.events.span("fp pass", block=plan.index) as facts, channel_power(loaded.module, searched) as power:
        with (
            observed(loaded.module, rounded, recipe.activations) as statistics,
            watched(loaded.module, stride) as routing,
        ):
            advance(job.activations, "fp", plan.index, loaded)
        reduce_over_ranks(job.ranks, list(routing.tokens.values()))
        starved = routing.starved(recipe.optimize.min_expert_tokens)
        power |= power_of_all_tokens(loaded, routing, starved, searched)
        reduce_over_ranks(job.ranks, list(power.values()))
        facts |= routing.facts
    with job.events.span("self-check", block=plan.index):
        together(job.ranks, lambda: check(loaded))
    grids = activation_grids(statistics, rounded, recipe.activations, job.ranks)
    return Seen(power=power, grids=grids, starved=starved)


@contextmanager
def in_training(job: Job, loaded: LoadedBlock, grids: Grids) -> Iterator[BlockInTraining]:
    """Yield a block with its trainer; in the body its activations are rounded to the grids."""
    trainer = trainer_for(job, loaded)
    with trainer.inputs.active(grids), objective_of(job, trainer, loaded) as objective:
        forward = served_forward(job, loaded)
        yield BlockInTraining(job=job, loaded=loaded, trainer=trainer, forward=forward, objective=objective)
        trainer.quantizer.release()


def start_at_nearest(block: BlockInTraining, seen: Seen) -> Start:
    """Move a block's weights from its source into the quantizers, round them to nearest, and measure the loss.

    Raises:
        QuantizationError: the loss is not finite; the same on all ranks.
    """
    job, trainer = block.job, block.trainer
    fixed = {matrix.name for matrix in block.loaded.plan.grids if expert_of(matrix) in seen.starved}
    with job.events.span("start", block=block.index):
        trainer.start(block.loaded.source, seen.power, fixed)
        block.loaded.source.clear()  # the quantizers hold the weights now, or their shard of them
        linears = trainer.served()
    with job.events.span("loss", block=block.index):
        loss = agreed_loss(block)
    is_kept = trainer.stepper is None or job.recipe.optimize.held_out
    return Start(loss, BestIterate(linears, loss) if is_kept else None, seen.starved)


def quantized_pass(job: Job, loaded: LoadedBlock, grids: Grids) -> Grids:
    """Move the quantized stream on through a block as it is served; return all grids of the block's activations.

    Nothing reads the last block's output: there the stream moves on only if grids have to be found.

    Args:
        grids: the grids known so far, to which activations are rounded.

    Raises:
        QuantizationError: an activation is not finite; the same on all ranks.
    """
    plan, options = loaded.plan, job.recipe.activations
    missing = {} if options.in_training else plan.activations
    if plan.is_last and not missing:
        return grids
    with trainer_for(job, loaded).inputs.active(grids):
        with job.events.span("quant pass", block=plan.index), observed(loaded.module, missing, options) as statistics:
            advance(job.activations, "quant", plan.index, served_forward(job, loaded))
        return grids | activation_grids(statistics, missing, options, job.ranks)
