"""One step of tuning a run's scales: samples through all blocks, forward and back, in the memory of one block."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from shardq.cache.store import STREAMS
from shardq.calib.tokens import next_tokens
from shardq.devices import to_device
from shardq.errors import QuantizationError, UnsupportedModelError
from shardq.formats.block_file import read_block
from shardq.logs import Display, Events
from shardq.model.arguments import Entering, hidden_of, with_hidden
from shardq.model.block import BlockPlan, LoadedBlock
from shardq.model.ends import prologue, whole_epilogue
from shardq.model.recorded import record_arguments
from shardq.model.skeleton import Skeleton
from shardq.model.weights import read_weights, stream_blocks
from shardq.optimize.loss import ToLogits, prediction_loss
from shardq.optimize.options import TuneOptions
from shardq.optimize.scale_tuner import ScaleTuner
from shardq.parallel.collectives import reduce_over_ranks, sum_over_ranks
from shardq.parallel.ranks import Ranks
from shardq.quant.quantized import QuantizedLinear
from shardq.rundir.folder import RunFolder
from shardq.rundir.plan import Plan
from shardq.training.passes import Activations, Forward, advance, embed_samples
from shardq.training.self_check import self_check
from shardq.training.trainer import collecting, training_output


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """The state of a tuning that all steps share.

    Attributes:
        run: folder of the run that has the codes.
        skeleton: skeleton of the float model.
        tuners: one tuner for each block.
        activations: generation 0 of this rank's samples, and the fp stream's last generation.
    """

    run: Path
    skeleton: Skeleton
    plan: Plan
    options: TuneOptions
    tokens_NT: Tensor
    tuners: list[ScaleTuner]
    activations: Activations
    ranks: Ranks
    events: Events
    display: Display

    def linears(self, block: BlockPlan) -> dict[str, QuantizedLinear]:
        """A block's linears with their tuned scales, by name within the block, in the plan's order, in CPU memory."""
        codes = read_block(RunFolder(self.run).block(block.index))
        linears = {matrix.name: codes[block.full_name(matrix)] for matrix in block.grids}
        return self.tuners[block.index].rescaled(linears)

    def loaded(self, blocks: Iterable[BlockPlan]) -> Iterator[LoadedBlock]:
        """Blocks with dequantized weights, in the dtype of the matrix multiplies; only codes go to the device."""
        device, dtype = self.activations.device, self.options.dtype

        def dequantized(linear: QuantizedLinear) -> Tensor:
            parts = (linear.codes_OI, linear.scale_OG, linear.zero_point_OG)
            return QuantizedLinear(*(to_device(part, device) for part in parts), linear.grid).dequantized(dtype)

        def read(block: BlockPlan) -> dict[str, Tensor]:
            linears = self.linears(block)
            source = read_weights(self.skeleton, block, device, {matrix.tensor for matrix in block.grids})
            return source | {matrix.tensor: dequantized(linears[matrix.name]) for matrix in block.grids}

        return stream_blocks(self.skeleton, blocks, device, dtype, partial(self.events.waiting, "input"), read=read)


def tunable(skeleton: Skeleton, plan: Plan, sequence_length: int, device: torch.device) -> Plan:
    """The plan with the blocks' arguments.

    Raises:
        UnsupportedModelError: blocks leave something for later ones, whose gradient would be missing.
    """
    with prologue(skeleton, device) as embed:
        plan = plan.with_arguments(record_arguments(skeleton, embed, sequence_length))
    if any(block.arguments.carried_names for block in plan.blocks):
        raise UnsupportedModelError(
            f"{type(skeleton.model).__name__}: its blocks hand tensors to later blocks, through which scales cannot be "
            "tuned; the run itself can be evaluated, exported and served"
        )
    return plan


def embed_and_target(
    skeleton: Skeleton, tokens_NT: Tensor, activations: Activations, ranks: Ranks, dtype: torch.dtype, checks: bool
) -> None:
    """Fill generation 0 and the fp stream's last, the target.

    The caller has to share an error with the other ranks.

    Args:
        checks: whether each block is checked against transformers' own forward.
    """
    with prologue(skeleton, activations.device) as embed:
        embed_samples(activations, tokens_NT, skeleton, embed)
    num_tokens = checks * len(activations.samples) * activations.sequence_length
    with self_check(skeleton, tokens_NT, activations, ranks, dtype, num_tokens) as check:
        for loaded in stream_blocks(skeleton, activations.blocks, activations.device, dtype):
            advance(activations, "fp", loaded.index, loaded)
            check(loaded)
            _forget(activations, loaded.index)
            del loaded  # frees the block's source before the block after the next is read


def tune_step(tuning: Tuning, step: int, samples: list[int]) -> float:
    """One optimizer step on this rank's part of a batch; give the batch's loss before it, in nats a token.

    The forward pass keeps each block's input. The backward pass computes each block once more for its gradient, and
    steps its scales at once, so that no part of a block stays in memory after its turn.

    Raises:
        QuantizationError: the loss is not finite; the same on every rank.
    """
    part = replace(tuning.activations, samples=samples)
    with tuning.events.span("forward", step=step):
        for loaded in tuning.loaded(tuning.plan.blocks[:-1]):
            advance(part, "quant", loaded.index, _forward(loaded))
            tuning.display.advance_iteration()
            del loaded
    with tuning.events.span("backward", step=step):
        gradients, loss = [], 0.0
        for loaded in tuning.loaded(reversed(tuning.plan.blocks)):
            if loaded.plan.is_last:
                loss, gradients = _at_the_end(tuning, loaded, samples)
            _back_through(tuning, loaded, samples, gradients, step)
            _forget(part, loaded.index)
            tuning.display.advance_iteration()
            del loaded
    return loss


def _forward(loaded: LoadedBlock) -> Forward:
    """Function from a block's input to its hidden states [N, T, D], with the attention kernel of training."""
    arguments = loaded.plan.arguments
    return lambda entering: training_output(loaded.module, arguments.bound(entering), loaded.dtype, arguments.lanes)


def _forget(activations: Activations, generation: int) -> None:
    """Drop a block's input, except the embeddings' output and the samples' own arguments, which every step uses."""
    if generation:
        activations.drop(generation, STREAMS)


def _at_the_end(tuning: Tuning, loaded: LoadedBlock, samples: list[int]) -> tuple[float, list[Tensor]]:
    """The batch's loss, and its gradient in each sample's [1, T, D] output of the last block."""
    options, device = tuning.options, tuning.activations.device
    gradients, total = [], 0.0
    forward = _forward(loaded)
    with whole_epilogue(tuning.skeleton, device, options.dtype) as of_tokens:
        to_logits = of_tokens(None)
        for sample in samples:
            with torch.no_grad():
                output_1TD = forward(tuning.activations.entering("quant", loaded.index, [sample]))
            labels_1T = to_device(next_tokens(tuning.tokens_NT[[sample]]), device)
            loss = _loss(tuning, output_1TD.requires_grad_(True), sample, labels_1T, to_logits)
            gradients += torch.autograd.grad(loss, output_1TD)
            total += loss.item()
    loss = sum_over_ranks(tuning.ranks, [total])[0] / tuning.tokens_NT.shape[1]
    if not math.isfinite(loss):
        error = QuantizationError("the loss of the predictions is not finite; lower tune.learning_rate")
        error.agreed = True  # every rank has added up the same numbers
        raise error
    return loss, gradients


def _loss(tuning: Tuning, output_1TD: Tensor, sample: int, labels_1T: Tensor, to_logits: ToLogits) -> Tensor:
    """A sample's share of its batch's loss, summed over the sequence."""
    options = tuning.options
    target_1TD = tuning.activations.load("fp", tuning.plan.num_blocks, [sample])
    loss = prediction_loss(output_1TD, target_1TD, labels_1T, options.label_weight, to_logits)
    return loss / options.batch_size


def _back_through(tuning: Tuning, loaded: LoadedBlock, samples: list[int], gradients: list[Tensor], step: int) -> None:
    """Take the samples' gradients from a block's output to its input, in place, and step the block's scales."""
    forward, tuner = _forward(loaded), tuning.tuners[loaded.index]
    weights = {matrix.name: matrix.weight_in(loaded.module) for matrix in loaded.plan.grids}

    def load(sample: int) -> Tensor | Entering:
        return tuning.activations.entering("quant", loaded.index, [sample])

    with collecting(weights.values()):
        for place, (_, entering) in enumerate(tuning.activations.ahead(load, samples)):
            hidden_1TD = hidden_of(entering).detach().requires_grad_(True)
            forward(with_hidden(entering, hidden_1TD)).backward(gradients[place])
            gradients[place] = hidden_1TD.grad
        collected = tuner.gradients(weights)
    reduce_over_ranks(tuning.ranks, list(collected.values()))
    tuner.step(collected, step, tuning.options.steps)
