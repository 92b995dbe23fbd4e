"""Training a block's quantizers to the end, across kills and numbers that are not finite."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from shardq.calib.partition import largest_part, step_samples, watched_samples
from shardq.calib.tokens import next_tokens
from shardq.devices import to_device
from shardq.errors import QuantizationError
from shardq.model.arguments import Entering, hidden_of, with_hidden
from shardq.model.block import LoadedBlock
from shardq.optimize.best_iterate import BestIterate
from shardq.optimize.distill import distill
from shardq.optimize.inputs import generator_for, mixed
from shardq.optimize.loss import ErrorSums
from shardq.parallel.collectives import sum_over_ranks
from shardq.quant.quantized import QuantizedLinear
from shardq.training import checkpoint
from shardq.training.checkpoint import Progress
from shardq.training.objective import Objective
from shardq.training.passes import Forward, compare
from shardq.training.trainer import BlockTrainer, Job, Linears

LOOKS = 10  # looks in a try: were all numbers finite, and what is the loss on the held-out samples, if there are any
RETRY_RATE = 0.5  # learning rates of a try, as a share of the previous try's


@dataclass(frozen=True, kw_only=True)
class BlockInTraining:
    """A block with its trainer and its objective.

    Attributes:
        trainer: the trainer of the block's kind.
        forward: from the block's input to its output, computed as the quantized model computes it.
    """

    job: Job
    loaded: LoadedBlock
    trainer: BlockTrainer
    forward: Forward
    objective: Objective

    @property
    def index(self) -> int:
        """The block's place in the model."""
        return self.loaded.index


class Start(NamedTuple):
    """The start of training: its loss, and its linears as the best iterate so far, if a best iterate is kept.

    `starved` has the routed experts that stay at the start, with the number of their tokens.
    """

    loss: float
    best: BestIterate | None
    starved: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class BlockResult:
    """A block's quantized linears by name within it, with their losses.

    Attributes:
        kind: kind of the objective.
        loss_before, loss_after: losses over the watched samples.
        failed_tries: trainings that ended at a number that is not finite.
        gave_up: whether all trainings did.
        starved: the routed experts that stay at the start, with the number of their tokens.
    """

    linears: Mapping[str, QuantizedLinear]
    kind: str
    loss_before: float
    loss_after: float
    failed_tries: int = 0
    gave_up: bool = False
    starved: dict[str, int] = field(default_factory=dict)

    @property
    def facts(self) -> dict[str, object]:
        """The facts about the block that the ledger keeps."""
        losses = {f"{self.kind}_before": self.loss_before, f"{self.kind}_after": self.loss_after}
        failed = {"failed_tries": self.failed_tries, "gave_up": self.gave_up} if self.failed_tries else {}
        return losses | failed | ({"starved_experts": self.starved} if self.starved else {})


def train(block: BlockInTraining, start: Start) -> BlockResult:
    """Train a block from its start, or from a checkpoint, and serve the linears that it is folded into.

    A try that meets a number that is not finite ends, on all ranks; the next one begins at the start with lower
    learning rates. A block that had a failed try becomes its best finite iterate: the end of the try that did not fail,
    the last finite iterate of one that did, or the start. A block without anything to train becomes its start.
    """
    job, trainer, retries = block.job, block.trainer, block.job.recipe.optimize.retries
    if trainer.stepper is None:
        return _result(block, start, start.best.linears, start.best.loss)
    purpose = checkpoint.purpose_of(job.checkpoints)
    saved = checkpoint.load(job.checkpoints, purpose, block.loaded.plan.grids, job.display.line)
    progress, state = saved or (Progress(best=start.best), None)
    start = start._replace(best=None)
    if saved:
        job.display.line(f"block {block.index}: training goes on after {progress.done} iterations")
    del saved
    while progress.failed <= retries:
        trainer.stepper.start(block.objective.iterations, RETRY_RATE**progress.failed)
        if state is not None:
            trainer.stepper.restore(state, progress.done)
            state = None
        job.display.start_training(progress.done, block.objective.iterations)
        try:
            linears, loss = _try(block, progress, purpose)
        except QuantizationError as error:
            _go_back(block, progress, start.loss)
            job.display.line(f"block {block.index}: {_reason(error)}; {_what_follows(job, progress)}")
            continue
        if not progress.failed:
            return _result(block, start, linears, loss)
        progress.best.offer(linears, loss)
        break
    trainer.serve(progress.best.linears)
    return _result(block, start, progress.best.linears, progress.best.loss, progress.failed)


def _result(block: BlockInTraining, start: Start, linears: Linears, loss: float, failed: int = 0) -> BlockResult:
    return BlockResult(
        linears=linears,
        kind=block.objective.kind,
        loss_before=start.loss,
        loss_after=loss,
        failed_tries=failed,
        gave_up=failed > block.job.recipe.optimize.retries,
        starved=start.starved,
    )


def _try(block: BlockInTraining, progress: Progress, purpose: dict) -> tuple[Linears, float]:
    """Train from `progress` to the end; serve the resulting linears, and return them and their loss.

    Raises:
        QuantizationError: a loss, a gradient, a parameter or a scale is not finite; the same on all ranks.
    """
    job, trainer, optimize = block.job, block.trainer, block.job.recipe.optimize
    span = partial(job.events.span, block=block.index)
    best, first = progress.best if optimize.held_out else None, progress.done
    iterations, every = block.objective.iterations, job.checkpoints.every
    with span("train") as facts:
        for progress.done, loss in _steps(block, first):
            job.activations.pace.end_step()  # looks, checkpoints and a stopped terminal have no time limit
            job.display.advance_iteration(loss)
            is_last = progress.done == iterations
            looks = is_last or progress.done % math.ceil(iterations / LOOKS) == 0
            saves = every > 0 and progress.done % every == 0 and not is_last
            if (looks or saves) and not trainer.stepper.is_finite():  # only looks and checkpoints wait for the device
                break
            if looks and best:
                best.offer(trainer.served(), agreed_loss(block))
            if saves:
                with job.events.waiting("checkpoint"):
                    checkpoint.save(job.checkpoints, purpose, block.index, progress, trainer.stepper.state())
        facts["iterations"] = progress.done - first
    if not trainer.stepper.is_finite():
        raise QuantizationError(f"a loss or gradient was not finite within {progress.done} iterations")
    trainer.stepper.release()
    with span("fold"):
        linears = best.linears if best else trainer.folded()
        trainer.serve(linears)
    with span("loss"):
        return linears, best.loss if best else agreed_loss(block)


def _steps(block: BlockInTraining, first: int) -> Iterator[tuple[int, Tensor]]:
    """Take the optimizer steps from number `first` on; yield the number of steps done, and the loss, after each."""
    trainer, optimize = block.trainer, block.job.recipe.optimize
    batches, mean_over = _batches(block, first), optimize.batch_size / block.job.ranks.world_size
    steps = distill(block.objective.loss, trainer.quantizer, trainer.stepper, batches, optimize.micro_batch, mean_over)
    return enumerate(steps, first + 1)


def _go_back(block: BlockInTraining, progress: Progress, loss_before: float) -> None:
    """After a failed try, keep its last iterate if it is the best so far, and reset the quantizers to the start."""
    trainer = block.trainer
    try:
        last = trainer.served()
        loss = agreed_loss(block)
    except QuantizationError:
        last, loss = {}, math.inf
    trainer.restart()
    progress.best = progress.best or BestIterate(trainer.folded(), loss_before)
    progress.best.offer(last, loss)
    progress.failed, progress.done = progress.failed + 1, 0


def _reason(error: QuantizationError) -> str:
    return str(error).partition(";")[0]


def _what_follows(job: Job, progress: Progress) -> str:
    if progress.failed > job.recipe.optimize.retries:
        return f"it is left at its best finite iterate, loss {progress.best.loss:.3e}"
    return f"trained again from its start, learning rates times {RETRY_RATE**progress.failed:g}"


def _batches(block: BlockInTraining, first: int) -> Iterator[tuple[Tensor | Entering, Tensor, Tensor]]:
    """Inputs, targets [N, T, D] and labels [N, T] of this rank, one batch an iteration from `first` on.

    Each is prepared during the previous step. Random draws depend only on the iteration's number.
    """
    job, block_index = block.job, block.index
    activations, optimize = job.activations, job.recipe.optimize
    labels_NT = next_tokens(job.tokens_NT)

    def load(step: tuple[int, list[int]]) -> tuple[Tensor | Entering, Tensor, Tensor]:
        iteration, samples = step
        if not samples:  # fewer samples a step than ranks
            return (torch.empty(0, device=activations.device),) * 3
        entering = activations.entering("quant", block_index, samples)
        if optimize.fp_mix > 0:
            fp_NTD = activations.load("fp", block_index, samples)
            generators = [generator_for(job.recipe.seed, block_index, iteration, sample) for sample in samples]
            pairs = zip(hidden_of(entering), fp_NTD, generators, strict=True)
            mixed_NTD = torch.stack([mixed(quant, fp, optimize.fp_mix, generator) for quant, fp, generator in pairs])
            entering = with_hidden(entering, mixed_NTD)
        target_NTD = activations.load("fp", block_index + 1, samples)
        return entering, target_NTD, to_device(labels_NT[samples], activations.device)

    num_trained, ranks = job.num_samples - optimize.held_out, job.ranks
    iterations = block.objective.iterations
    steps = step_samples(num_trained, optimize.batch_size, iterations, ranks.rank, ranks.world_size)
    part = largest_part(optimize.batch_size, ranks.world_size)
    return (batch for _, batch in activations.ahead(load, islice(steps, first, None), part))


@torch.no_grad()
def agreed_loss(block: BlockInTraining) -> float:
    """The block's present loss, over all ranks' watched samples.

    Raises:
        QuantizationError: it is not finite.
    """
    job, block_index = block.job, block.index
    samples = watched_samples(job.num_samples, job.recipe.optimize.held_out, job.ranks.rank, job.ranks.world_size)
    sums = compare(job.activations, block_index, samples, block.forward, block.objective.errors)
    total = ErrorSums(*sum_over_ranks(job.ranks, [sums.error, sums.weight]))
    if not math.isfinite(total.loss):
        error = QuantizationError("its loss is not finite; check the model's activations for overflow")
        error.agreed = True  # every rank has added up the same numbers
        raise error
    return total.loss
