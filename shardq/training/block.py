"""One decoder block, from its weights and the activations that enter it to its quantized linears."""

from functools import partial

from torch import Tensor

from shardq.model.arguments import BlockArguments
from shardq.model.ends import block_forward
from shardq.model.weights import LoadedBlock
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


def quantize_block(
    job: BlockJob,
    loaded: LoadedBlock,
    linear_names: list[str],
    activation_bits: dict[str, int],
    arguments: BlockArguments,
    is_last: bool,
    check: Check,
) -> tuple[BlockResult, dict[str, ActivationGrid]]:
    """Quantize one block in place; its next generation of both streams is in the store afterwards.

    The quantized stream is not taken through the last block, whose output nothing reads, but for its activations.

    Args:
        activation_bits: of the activations that get a grid, by name within the block.
        check: compares the block's output with the model's own.

    Returns:
        what training gave, and those grids.

    Raises:
        QuantizationError: the loss at the start, or an activation, is not finite.
    """
    block_index, activations, encodings = loaded.index, job.activations, job.encodings
    span = partial(job.events.span, block=block_index)
    # 1. The fp stream moves on: its output is the target now and the next block's input.
    searched = linear_names if job.optimize.start == "search" else []
    early, late = (activation_bits, {}) if encodings.in_training else ({}, activation_bits)
    with span("fp pass"), channel_power(loaded.module, searched) as power:
        with observed(loaded.module, early, encodings) as statistics:
            advance(activations, "fp", block_index, block_forward(loaded.module, arguments, job.optimize.dtype))
        reduce_over_ranks(job.ranks, list(power.values()))
    with span("self-check"):
        together(job.ranks, lambda: check(loaded))
    grids = activation_grids(statistics, early, encodings, job.spec.scale_dtype, job.ranks)
    bench = bench_for(job, loaded, linear_names, arguments)
    forward = served_forward(job, loaded, linear_names, activation_bits, arguments)
    with bench.inputs.active(grids):
        with objective_of(job, bench, loaded, arguments, is_last) as objective:
            at_hand = BlockAtHand(job, bench, block_index, forward, objective)
            result = _trained(at_hand, loaded.source, power)
        # 4. The quantized stream moves on through the weights as they are served; its activations are looked at.
        if late or not is_last:
            with span("quant pass"), observed(loaded.module, late, encodings) as statistics:
                advance(activations, "quant", block_index, forward)
            grids |= activation_grids(statistics, late, encodings, job.spec.scale_dtype, job.ranks)
    return result, grids


def _trained(at_hand: BlockAtHand, source: dict[str, Tensor], power: dict[str, Tensor]) -> BlockResult:
    """Quantize the block's weights, which are taken out of `source`; the block computes with the result."""
    job, bench = at_hand.job, at_hand.bench
    span = partial(job.events.span, block=at_hand.index)
    # 2. The block starts as round-to-nearest; how far is it off?
    with span("start"):
        gathered = bench.stepper.gathered if bench.stepper else whole
        bench.quantizer.start(source, power, gathered)
        source.clear()  # the quantizers hold it, or their shard of it
        linears = bench.quantizer.folded(gathered)
        bench.quantizer.serve(linears, job.as_written)
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
