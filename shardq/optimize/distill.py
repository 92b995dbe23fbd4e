"""Blockwise knowledge distillation: train a block's quantizers to give the fp block's output."""

from collections.abc import Callable, Iterable

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
) -> int:
    """Train in place, one optimizer step a batch; gives the number of steps. Nothing in a step waits for the device.

    Args:
        loss_of: mean loss over the samples of a micro-batch, from the block's inputs and targets [N, T, D].
        batches: this rank's inputs and targets, both [N, T, D], one pair an iteration.
        micro_batch: samples that go through the block at once.
        on_step: called after each step with the batch's loss, a tensor on the device, for progress.
        goes_on: called after each step with the number of steps done; training ends where it is false.
    """
    done = 0
    for done, (inputs_NTD, targets_NTD) in enumerate(batches, 1):
        quantizer.load(stepper.forward())
        loss = accumulate(loss_of, inputs_NTD, targets_NTD, micro_batch)
        stepper.backward(*quantizer.collected())
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
) -> Tensor:
    """Collect the gradient of a batch's mean loss in the block's weights; gives that loss."""
    total = torch.zeros((), device=inputs_NTD.device)
    for inputs, targets in zip(inputs_NTD.split(micro_batch), targets_NTD.split(micro_batch), strict=True):
        loss = loss_of(inputs, targets) * (len(inputs) / len(inputs_NTD))
        loss.backward()
        total += loss.detach()
    return total
