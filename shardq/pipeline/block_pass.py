"""One decoder block, from its weights and the activations that enter it to its quantized linears."""

from functools import partial

from shardq.model.ends import BlockArguments, block_forward
from shardq.model.weights import LoadedBlock
from shardq.optimize.best_iterate import BestIterate
from shardq.optimize.block_quantizer import whole
from shardq.optimize.channel_power import channel_power
from shardq.parallel.collectives import add_over_ranks
from shardq.pipeline.bench import BlockJob, bench_for, loss_of
from shardq.pipeline.passes import advance
from shardq.pipeline.training import BlockAtHand, BlockResult, agreed_loss, train


def quantize_block(
    job: BlockJob, loaded: LoadedBlock, linear_names: list[str], arguments: BlockArguments, is_last: bool
) -> BlockResult:
    """Quantize one block in place; its next generation of both streams is in the store afterwards.

    The quantized stream is not written after the last block: nothing reads it.

    Raises:
        QuantizationError: the loss at the start is not finite.
    """
    block_index, activations = loaded.index, job.activations
    span = partial(job.events.span, block=block_index)
    forward = block_forward(loaded.module, arguments, job.optimize.dtype)
    # 1. The fp stream moves on: its output is the target now and the next block's input.
    searched = linear_names if job.optimize.start == "search" else []
    with span("fp pass"), channel_power(loaded.module, searched) as power:
        advance(activations, "fp", block_index, forward)
        add_over_ranks(job.ranks, list(power.values()))
    bench = bench_for(job, loaded, linear_names, arguments)
    # 2. The block starts as round-to-nearest; how far is it off?
    with span("start"):
        gathered = bench.stepper.gathered if bench.stepper else whole
        bench.quantizer.start(loaded.source, power, gathered)
        loaded.source.clear()  # the quantizers hold it, or their shard of it
        linears = bench.quantizer.folded(gathered)
        bench.quantizer.serve(linears, job.stored)
    at_hand = BlockAtHand(job, bench, block_index, forward, loss_of(job, bench, loaded, arguments))
    with span("loss"):
        loss_before = agreed_loss(at_hand)
    if bench.stepper is None:
        result = BlockResult(linears, loss_before, loss_before)
    else:
        # 3. Train its quantizers into codes and grid; the start is kept only where it may turn out the best.
        best = BestIterate(linears, loss_before) if job.optimize.held_out else None
        del linears
        result = train(at_hand, loss_before, best)
    bench.quantizer.release()
    # 4. The quantized stream moves on through the weights as they are served.
    if not is_last:
        with span("quant pass"):
            advance(activations, "quant", block_index, forward)
    return result
