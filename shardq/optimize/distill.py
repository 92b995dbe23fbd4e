"""Blockwise knowledge distillation: train a block's quantizers to give the fp block's output."""

from collections.abc import Callable, Iterable

from torch import Tensor

from shardq.optimize.loss import distillation_loss
from shardq.optimize.stepper import Stepper


def distill(
    forward: Callable[[Tensor], Tensor],
    stepper: Stepper,
    batches: Iterable[tuple[Tensor, Tensor]],
    on_step: Callable[[], None],
) -> None:
    """Train in place, one optimizer step a batch.

    Args:
        forward: the quantized block, [N, T, D] -> [N, T, D].
        batches: this rank's inputs and targets, both [N, T, D], one pair an iteration.
        on_step: called after each step, for progress.
    """
    for inputs_NTD, targets_NTD in batches:
        stepper.backward(distillation_loss(forward(inputs_NTD), targets_NTD))
        stepper.step()
        on_step()
