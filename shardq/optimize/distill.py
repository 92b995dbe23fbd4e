"""Blockwise knowledge distillation: train a block's quantizers to give the fp block's output."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from shardq.optimize.block_quantizer import BlockQuantizer
from shardq.optimize.stepper import Stepper


def distill(
    loss_of: Callable[[Tensor, Tensor], Tensor],
    quantizer: BlockQuantizer,
    stepper: Stepper,
    batches: Iterable[tuple[Tensor, Tensor]],
    micro_batch: int,
    on_step: Callable[[Tensor], None],
    goes_on: Callable[[int], bool] = lambda done: True,
    mean_over: float | None = None,
) -> int:
    """Train in place, one optimizer step a batch; gives the number of steps. Nothing in a step waits for the device.

    Args:
        loss_of: mean loss over the samples of a micro-batch, from the block's inputs and targets [N, T, D].
        batches: this rank's inputs and targets, both [N, T, D], one pair an iteration; N may be 0.
        micro_batch: samples that go through the block at once.
        on_step: called after each step with this rank's loss, a tensor on the device, for progress.
        goes_on: called after each step with the number of steps done; training ends where it is false.
        mean_over: samples that a batch's loss is divided by (default: its own). The same number on all ranks, the
            batch's mean part of a rank, makes the mean of the ranks' gradients that of the batch, however it is split.
    """
    done = 0
    for done, (inputs_NTD, targets_NTD) in enumerate(batches, 1):
        quantizer.load(stepper.forward(), adding_up=micro_batch < len(inputs_NTD))
        loss = accumulate(
            loss_of, inputs_NTD, targets_NTD, micro_batch, mean_over or len(inputs_NTD), quantizer.leaving
        )
        stepper.backward(quantizer.collected())
        stepper.step()
        on_step(loss)
        if not goes_on(done):
            break
    return done


def accumulate(
    loss_of: Callable[[Tensor, Tensor], Tensor],
    inputs_NTD: Tensor,
    targets_NTD: Tensor,
    micro_batch: int,
    mean_over: float,
    last: Callable[[], AbstractContextManager] = nullcontext,
) -> Tensor:
    """Collect the gradient of a batch's loss in the block's weights; gives that loss.

    It is the sum over the batch's samples, divided by `mean_over`. The gradient of a loss that is not finite is NaN
    everywhere: thereby all ranks hear of it in what they reduce anyway.

    Args:
        last: entered for the last micro-batch's forward pass.
    """
    total = torch.zeros((), device=inputs_NTD.device)
    for start in range(0, len(inputs_NTD), micro_batch):
        inputs, targets = inputs_NTD[start : start + micro_batch], targets_NTD[start : start + micro_batch]
        with last() if start + micro_batch >= len(inputs_NTD) else nullcontext():
            loss = loss_of(inputs, targets) * (len(inputs) / mean_over)
        loss.backward(1 + 0 * loss.detach())
        total += loss.detach()
    return total
