"""Blockwise knowledge distillation: train a block's quantizers towards the fp block's output."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from shardq.optimize.block_quantizer import BlockQuantizer
from shardq.optimize.stepper import Stepper


def distill(
    loss_of: Callable[..., Tensor],
    quantizer: BlockQuantizer,
    stepper: Stepper,
    batches: Iterable[tuple[Tensor, ...]],
    micro_batch: int,
    mean_over: float | None = None,
) -> Iterator[Tensor]:
    """Train in place, one optimizer step a batch; yield this rank's loss, on the device, after each step.

    Nothing in a step waits for the device. Training ends with the batches, or where the caller leaves the loop; between
    two steps no batch is kept in memory.

    Args:
        loss_of: mean loss over the samples of a micro-batch, from their part of the batch's tensors.
        batches: this rank's inputs and targets, both [N, T, D], and further arguments of `loss_of`, one value a sample;
            one batch an iteration; N may be 0.
        micro_batch: samples that go through the block at once.
        mean_over: number of samples that a batch's loss is divided by (default: the rank's own). If it is the whole
            batch's samples over the ranks, the mean of the ranks' gradients is the batch's gradient for any split.
    """
    for batch in batches:
        quantizer.load(stepper.forward(), adding_up=micro_batch < len(batch[0]))
        loss = accumulate(loss_of, batch, micro_batch, mean_over or len(batch[0]), quantizer.leaving)
        stepper.backward(quantizer.collected())
        stepper.step()
        del batch
        yield loss


def accumulate(
    loss_of: Callable[..., Tensor],
    batch: tuple[Tensor, ...],
    micro_batch: int,
    mean_over: float,
    last: Callable[[], AbstractContextManager] = nullcontext,
) -> Tensor:
    """Collect the gradient of a batch's loss in the block's weights, and return the loss.

    The loss is the sum over the batch's samples, divided by `mean_over`. The gradient of a loss that is not finite is
    NaN everywhere, so all ranks learn of it from the gradients that they reduce.

    Args:
        last: entered for the last micro-batch's forward pass.
    """
    num_samples = len(batch[0])
    total = torch.zeros((), device=batch[0].device)
    for start in range(0, num_samples, micro_batch):
        some = [values[start : start + micro_batch] for values in batch]
        with last() if start + micro_batch >= num_samples else nullcontext():
            loss = loss_of(*some) * (len(some[0]) / mean_over)
        loss.backward(1 + 0 * loss.detach())
        total += loss.detach()
    return total
