"""One decoder block, from its weights and the activations that enter it to its quantized linears."""

from functools import partial

from torch import Tensor

from shardq.model.block import LoadedBlock
from shardq.optimize.best_iterate import BestIterate
from shardq.optimize.block_quantizer import whole
from shardq.optimize.channel_power import channel_power
from shardq.parallel.collectives import reduce_over_ranks, together
from shardq.quant.activation import ActivationGrid
from shardq.training.activation_grids import activation_grids, observed
from shardq.training.objective import objective_of
from shardq.training.passes import advance
from shardq.training.self_check import Check
from shardq.training.tries import BlockAtHand, BlockResult, agreed_loss, train
from shardq.training.workshop import BlockJob, bench_for, served_forward


def quantize_block(job: BlockJob, loaded: LoadedBlock, check: Check) -> tuple[BlockResult, dict[str, ActivationGrid]]:
    """Quantize one block in place; its next generation of both streams is in the store afterwards.

    The quantized stream is not taken through the last block, whose output nothing reads, but for its activations.

    Args:
        check: compares the block's output with the model's own.

    Returns:
        what training gave, and the grids of the activations that are to have one, by name within the block.

    Raises:
        QuantizationError: the loss at the start, or an activation, is not finite.
    """
    plan, activations, encodings = loaded.plan, job.activations, job.encodings
    span = partial(job.events.span, block=plan.index)
    # 1. The fp stream moves on: its output is the target now and the next block's input.
    searched = plan.grids if job.optimize.start == "search" else ()
    early, late = (plan.activations, {}) if encodings.in_training else ({}, plan.activations)
    with span("fp pass"), channel_power(loaded.module, searched) as power:
        with observed(loaded.module, early, encodings) as statistics:
            advance(activations, "fp", plan.index, loaded)
        reduce_over_ranks(job.ranks, list(power.values()))
    with span("self-check"):
        together(job.ranks, lambda: check(loaded))
    grids = activation_grids(statistics, early, encodings, job.ranks)
    bench, forward = bench_for(job, loaded), served_forward(job, loaded)
    with bench.inputs.active(grids):
        with objective_of(job, bench, loaded) as objective:
            at_hand = BlockAtHand(job, bench, plan, forward, objective)
            result = _trained(at_hand, loaded.source, power)
        # 4. The quantized stream moves on through the weights as they are served; its activations are looked at.
        if late or not plan.is_last:
            with span("quant pass"), observed(loaded.module, late, encodings) as statistics:
                advance(activations, "quant", plan.index, forward)
            grids |= activation_grids(statistics, late, encodings, job.ranks)
    return result, grids


def _trained(at_hand: BlockAtHand, source: dict[str, Tensor], power: dict[str, Tensor]) -> BlockResult:
    """Quantize the block's weights, which are taken out of `source`; the block computes with the result."""
    job, bench = at_hand.job, at_hand.bench
    span = partial(job.events.span, block=at_hand.plan.index)
    # 2. The block starts as round-to-nearest; how far is it off?
    with span("start"):
        gathered = bench.stepper.gathered if bench.stepper else whole
        bench.quantizer.start(source, power, gathered)
        source.clear()  # the quantizers hold it, or their shard of it
        linears = bench.quantizer.folded(gathered)
        bench.quantizer.serve(linears, job.stored)
    with span("loss"):
        loss_before = agreed_loss(at_hand)
    if bench.stepper is None:
        result = BlockResult(linears, at_hand.objective.kind, loss_before, loss_before)
    else:
        # 3. Train its quantizers into codes and grid; the start is kept only where it may turn out the best.
        best = BestIterate(linears, loss_before) if job.optimize.held_out else None
        del linears
        result = train(at_hand, loss_before, best)
    bench.quantizer.release()
    return result
