"""One decoder block, from its weights and the activations that enter it to its quantized linears."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.attention import sdpa_kernel

from shardq.calib.partition import largest_part, step_samples, watched_samples
from shardq.compiling import Compile
from shardq.devices import training_attention
from shardq.errors import QuantizationError
from shardq.logs import Display, Events
from shardq.model.ends import BlockArguments, block_forward, run_block
from shardq.model.weights import LoadedBlock
from shardq.optimize.best_iterate import BestIterate
from shardq.optimize.block_quantizer import BlockQuantizer, whole
from shardq.optimize.channel_power import channel_power
from shardq.optimize.distill import accumulate, distill
from shardq.optimize.inputs import generator_for, mixed
from shardq.optimize.loss import ErrorSums, Loss, distillation_loss
from shardq.optimize.options import OptimizeOptions
from shardq.optimize.stepper import LocalStepper, Stepper
from shardq.parallel.allreduce_stepper import AllReduceStepper
from shardq.parallel.collectives import add_over_ranks, sum_over_ranks
from shardq.parallel.deepspeed_stepper import DeepSpeedStepper
from shardq.parallel.options import ParallelOptions
from shardq.parallel.ranks import Ranks
from shardq.parallel.row_share import RowShare
from shardq.pipeline.passes import Activations, advance, compare
from shardq.quant import adascale
from shardq.quant.quantized import QuantizedLinear
from shardq.quant.spec import QuantSpec

LOOKS = 10  # times that a block's training looks at the held-out samples


@dataclass(frozen=True)
class Bench:
    """What trains blocks of one kind: built for the first of them, started anew for each."""

    quantizer: BlockQuantizer
    stepper: Stepper | None  # None where nothing is trained
    loss: Callable[..., Tensor]


@dataclass(frozen=True)
class BlockJob:
    """What quantizing a block needs beside the block, the same for all blocks of a run.

    `benches` fills up as kinds of blocks are met; its keys are the shared module and the linears quantized in it.
    """

    seed: int
    method: str
    spec: QuantSpec
    optimize: OptimizeOptions
    parallel: ParallelOptions
    num_samples: int
    stored: Callable[[Tensor], Tensor]
    activations: Activations
    ranks: Ranks
    events: Events
    display: Display
    compiled: Compile
    benches: dict[tuple, Bench] = field(default_factory=dict)


@dataclass(frozen=True)
class BlockResult:
    """Quantized linears by name within the block, and the relative loss over the watched samples."""

    linears: dict[str, QuantizedLinear]
    loss_before: float
    loss_after: float


def quantize_block(
    job: BlockJob, loaded: LoadedBlock, linear_names: list[str], arguments: BlockArguments, is_last: bool
) -> BlockResult:
    """Quantize one block in place; its next generation of both streams is in the store afterwards.

    The quantized stream is not written after the last block: nothing reads it.

    Raises:
        QuantizationError: a scale or the loss is not finite.
    """
    block_index, activations = loaded.index, job.activations
    span = partial(job.events.span, block=block_index)
    forward = block_forward(loaded.module, arguments, job.optimize.dtype)
    # 1. The fp stream moves on: its output is the target now and the next block's input.
    searched = linear_names if job.optimize.start == "search" else []
    with span("fp pass"), channel_power(loaded.module, searched) as power:
        advance(activations, "fp", block_index, forward)
        add_over_ranks(job.ranks, list(power.values()))
    bench = _bench(job, loaded, linear_names, arguments)
    # 2. The block starts as round-to-nearest; how far is it off?
    with span("start"):
        gathered = bench.stepper.gathered if bench.stepper else whole
        bench.quantizer.start(loaded.source, power, gathered)
        loaded.source.clear()  # the quantizers hold it, or their shard of it
        linears = bench.quantizer.folded(gathered)
        bench.quantizer.serve(linears, job.stored)
    with span("loss"):
        loss_before = loss_after = _agreed_loss(job, block_index, forward)
    if bench.stepper is not None:
        # 3. Train its quantizers; the start is kept only where it may turn out the best.
        best = BestIterate(linears, loss_before) if job.optimize.held_out else None
        del linears
        with span("train") as facts:
            facts["iterations"] = _train(job, bench, loaded, arguments, forward, best)
        bench.stepper.rest()
        # 4. They become codes and grid.
        with span("fold"):
            linears = best.linears if best else bench.quantizer.folded(gathered)
            bench.quantizer.serve(linears, job.stored)
        with span("loss"):
            loss_after = best.loss if best else _agreed_loss(job, block_index, forward)
    bench.quantizer.release()
    # 5. The quantized stream moves on through the weights as they are served.
    if not is_last:
        with span("quant pass"):
            advance(activations, "quant", block_index, forward)
    return BlockResult(linears, loss_before, loss_after)


def _train(
    job: BlockJob,
    bench: Bench,
    loaded: LoadedBlock,
    arguments: BlockArguments,
    forward: Callable[[Tensor], Tensor],
    best: BestIterate | None,
) -> int:
    """Train the block's quantizers, looking for the best iterate where that is kept; gives the number of steps."""
    optimize = job.optimize
    interval = math.ceil(optimize.iterations / LOOKS)

    def goes_on(done: int) -> bool:
        if best is None:
            return True
        if done % interval == 0 or done == optimize.iterations:
            linears = bench.quantizer.folded(bench.stepper.gathered)
            bench.quantizer.serve(linears, job.stored)
            best.offer(linears, _agreed_loss(job, loaded.index, forward))
        return optimize.patience is None or best.num_stale < optimize.patience

    bench.stepper.start()
    batches, on_step = _training_batches(job, loaded.index), job.display.advance_iteration
    return distill(_loss_of(job, bench, loaded, arguments), bench.quantizer, bench.stepper, batches,
                   optimize.micro_batch, on_step, goes_on, optimize.batch_size / job.ranks.world_size)  # fmt: skip


def _bench(job: BlockJob, loaded: LoadedBlock, linear_names: list[str], arguments: BlockArguments) -> Bench:
    """The bench for blocks of this kind; compiled if this is the first of them."""
    key = (loaded.module, tuple(linear_names))
    if key not in job.benches:
        start = time.perf_counter()
        with job.events.span("compile", block=loaded.index):
            job.benches[key] = _make_bench(job, loaded, linear_names, arguments)
        if job.optimize.compile == "on":
            job.display.line(f"compiled the training step in {time.perf_counter() - start:.1f} s")
    return job.benches[key]


def _make_bench(job: BlockJob, loaded: LoadedBlock, linear_names: list[str], arguments: BlockArguments) -> Bench:
    optimize = job.optimize
    kernels = adascale.Kernels(*(job.compiled(kernel, True) for kernel in adascale.Kernels()))
    # Gradients of several micro-batches add up in the weight's dtype, which has to be float32 for that.
    is_whole = optimize.micro_batch >= largest_part(optimize.batch_size, job.ranks.world_size)
    dtype = optimize.dtype if is_whole else torch.float32
    share = RowShare(job.ranks, job.parallel) if job.parallel.engine == "rows" else None
    quantizer = BlockQuantizer(loaded.module, linear_names, job.spec, job.method, kernels, dtype, share)
    bench = Bench(quantizer, None, job.compiled(block_loss, False))
    if job.method == "rtn" or not linear_names:
        return bench
    _rehearse(job, bench, loaded, arguments)
    return replace(bench, stepper=_make_stepper(job, quantizer))


def _rehearse(job: BlockJob, bench: Bench, loaded: LoadedBlock, arguments: BlockArguments) -> None:
    """One forward and backward without a step, so that compiling happens, and is timed, here."""
    part = largest_part(job.optimize.batch_size, job.ranks.world_size)
    samples = list(job.activations.samples[: min(job.optimize.micro_batch, part)])
    hidden_NTD = job.activations.load("fp", loaded.index, samples)
    bench.quantizer.start(loaded.source)
    loss_of, size = _loss_of(job, bench, loaded, arguments), len(samples)
    bench.quantizer.load(bench.quantizer())
    accumulate(loss_of, hidden_NTD, hidden_NTD, size, size, bench.quantizer.leaving)
    bench.quantizer.collected().backward()
    bench.quantizer.zero_grad()


def _make_stepper(job: BlockJob, quantizer: BlockQuantizer) -> Stepper:
    if job.parallel.zero_stage:
        return DeepSpeedStepper(quantizer, job.optimize, job.parallel, job.ranks)
    if job.parallel.engine in ("local", "rows"):
        return LocalStepper(quantizer, job.optimize)
    return AllReduceStepper(quantizer, job.optimize, job.parallel, job.ranks)


def block_loss(
    block: nn.Module,
    inputs_NTD: Tensor,
    targets_NTD: Tensor,
    args: tuple,
    kwargs: dict,
    dtype: torch.dtype,
    kind: Loss = "squared",
) -> Tensor:
    """Training loss of a block: what is compiled, forward and backward, as one piece."""
    with sdpa_kernel(training_attention(inputs_NTD.device, inputs_NTD.shape[1], dtype)):
        return distillation_loss(run_block(block, inputs_NTD, args, kwargs, dtype), targets_NTD, kind)


def _loss_of(
    job: BlockJob, bench: Bench, loaded: LoadedBlock, arguments: BlockArguments
) -> Callable[[Tensor, Tensor], Tensor]:
    def loss_of(inputs_NTD: Tensor, targets_NTD: Tensor) -> Tensor:
        return bench.loss(
            loaded.module, inputs_NTD, targets_NTD, arguments.args, arguments.kwargs, job.optimize.dtype,
            job.optimize.loss,
        )  # fmt: skip

    return loss_of


def _training_batches(job: BlockJob, block_index: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets [N, T, D] of this rank, one pair an iteration, each prepared during the one before."""
    activations, optimize = job.activations, job.optimize

    def load(step: tuple[int, list[int]]) -> tuple[Tensor, Tensor]:
        iteration, samples = step
        if not samples:  # fewer samples a step than ranks
            nothing = torch.empty(0, device=activations.device)
            return nothing, nothing
        quant_NTD = activations.load("quant", block_index, samples)
        if optimize.fp_mix > 0:
            fp_NTD = activations.load("fp", block_index, samples)
            generators = [generator_for(job.seed, block_index, iteration, sample) for sample in samples]
            pairs = zip(quant_NTD, fp_NTD, generators, strict=True)
            quant_NTD = torch.stack([mixed(quant, fp, optimize.fp_mix, generator) for quant, fp, generator in pairs])
        return quant_NTD, activations.load("fp", block_index + 1, samples)

    num_trained, ranks = job.num_samples - optimize.held_out, job.ranks
    steps = step_samples(num_trained, optimize.batch_size, optimize.iterations, ranks.rank, ranks.world_size)
    return (batch for _, batch in activations.ahead(load, steps))


@torch.no_grad()
def _agreed_loss(job: BlockJob, block_index: int, forward: Callable[[Tensor], Tensor]) -> float:
    """Relative loss of the block as it is now, over all ranks' watched samples."""
    samples = watched_samples(job.num_samples, job.optimize.held_out, job.ranks.rank, job.ranks.world_size)
    sums = compare(job.activations, block_index, samples, forward, job.optimize.loss)
    total = ErrorSums(*sum_over_ranks(job.ranks, [sums.squared_error, sums.target_power]))
    if not torch.isfinite(torch.tensor(total.relative_loss)):
        error = QuantizationError(
            f"block {block_index}: the loss is not finite; lower optimize.grid_lr and optimize.weight_lr, or check the "
            "model's activations for overflow"
        )
        error.agreed = True  # every rank has added up the same numbers
        raise error
    return total.relative_loss
