"""What a block is trained to, and judged by: the fp block's output or, of the last block, what the model predicts."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import Tensor

from shardq.model.ends import BlockArguments, whole_epilogue
from shardq.model.weights import LoadedBlock
from shardq.optimize.loss import (
    ErrorSums,
    at_positions,
    error_sums,
    furthest_off,
    prediction_error,
    prediction_loss,
    prediction_sums,
)
from shardq.pipeline.bench import Bench, BlockJob, loss_of

LOSSES = {"loss": "relative loss {:.3e} -> {:.3e}", "divergence": "KL divergence {:.4f} -> {:.4f} nats a token"}
"""Kinds of objective, and what users read of one: the loss before and after training."""

OUTPUT_WEIGHT = 30.0  # of the output's relative error; divergence alone does worse on held-out text (measured)
PREDICTED_SHARE = 0.5  # of a sample's positions, those furthest off; as good as all, and the head is most of a step
PREDICTION_STEPS = 2  # times as many as the other blocks'; with that weight more steps still gain (measured)


@dataclass(frozen=True)
class Objective:
    """How far a block is from the fp block.

    Attributes:
        kind: `loss`, of its output, relative to the target; `divergence`, of the model's predictions, in nats a token.
        iterations: optimizer steps to train to it.
        loss: the training loss, from inputs and targets [N, T, D] and labels [N, T], at each position the token that
            comes next, or -1 where none is known.
        errors: what is reported and what iterates are chosen by, from outputs and targets [N, T, D].
    """

    kind: Literal["loss", "divergence"]
    iterations: int
    loss: Callable[[Tensor, Tensor, Tensor], Tensor]
    errors: Callable[[Tensor, Tensor], ErrorSums]


@contextmanager
def objective_of(
    job: BlockJob, bench: Bench, loaded: LoadedBlock, arguments: BlockArguments, is_last: bool
) -> Iterator[Objective]:
    """Yield a block's objective; the model's head is in memory meanwhile where it is needed."""
    iterations = job.optimize.iterations
    if not (is_last and bench.stepper is not None and job.optimize.last_block == "predictions"):
        of_output = loss_of(job, bench, loaded, arguments, job.optimize.loss)
        errors = partial(error_sums, kind=job.optimize.loss)
        yield Objective("loss", iterations, lambda inputs, targets, labels: of_output(inputs, targets)[0], errors)
        return
    of_output = loss_of(job, bench, loaded, arguments, "token")
    kernel, label_weight = job.compiled(prediction_error, False), job.optimize.label_weight
    with whole_epilogue(job.skeleton, job.activations.device, job.optimize.dtype) as to_logits:

        def loss(inputs_NTD: Tensor, targets_NTD: Tensor, labels_NT: Tensor) -> Tensor:
            error, output_NTD = of_output(inputs_NTD, targets_NTD)
            positions = furthest_off(output_NTD, targets_NTD, math.ceil(output_NTD.shape[1] * PREDICTED_SHARE))
            chosen = (at_positions(values, positions) for values in (output_NTD, targets_NTD, labels_NT))
            return prediction_loss(*chosen, label_weight, to_logits, kernel) + OUTPUT_WEIGHT * error

        errors = partial(prediction_sums, to_logits=to_logits, kernel=kernel)
        yield Objective("divergence", PREDICTION_STEPS * iterations, loss, errors)
