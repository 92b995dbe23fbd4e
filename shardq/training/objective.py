"""The training target and loss of a block: the fp block's output or, for the last block, the fp model's predictions."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from shardq.model.block import LoadedBlock
from shardq.model.ends import whole_epilogue
from shardq.optimize.loss import (
    ErrorSums,
    ToLogits,
    error_sums,
    prediction_error,
    prediction_loss,
    prediction_sums,
    summed_probabilities,
)
from shardq.parallel.collectives import reduce_over_ranks
from shardq.training.trainer import BlockTrainer, Job

LOSSES = {"loss": "relative loss {:.3e} -> {:.3e}", "divergence": "KL divergence {:.4f} -> {:.4f} nats a token"}
"""Kinds of objective, which name the losses that are reported before and after training."""

OUTPUT_WEIGHT = 30.0  # weight of the output's relative error; only divergence does worse on held-out text (measured)
LIKELY_TOKENS = 8192  # tokens whose predictions the last block is trained to; as good as all tokens (measured)
POSITION_STRIDE = 4  # one position in four is read to find the likely tokens
PREDICTION_STEPS = 2  # factor on the other blocks' steps; with OUTPUT_WEIGHT more steps still gain (measured)


@dataclass(frozen=True, kw_only=True)
class Objective:
    """A block's training loss, and the error that is reported.

    Attributes:
        kind: `loss`: error of the output relative to the target; `divergence` of the model's predictions, in nats a
            token.
        iterations: number of optimizer steps.
        loss: the training loss, from inputs and targets [N, T, D] and labels [N, T], the next token at each position,
            or -1 where none is known.
        errors: from outputs and targets [N, T, D] to the error that is reported and that chooses the best iterate.
    """

    kind: Literal["loss", "divergence"]
    iterations: int
    loss: Callable[[Tensor, Tensor, Tensor], Tensor]
    errors: Callable[[Tensor, Tensor], ErrorSums]


@contextmanager
def objective_of(job: Job, trainer: BlockTrainer, loaded: LoadedBlock) -> Iterator[Objective]:
    """Yield a block's objective; if it needs the model's head, the head is in memory during the body."""
    optimize = job.recipe.optimize
    if not (loaded.plan.is_last and trainer.stepper is not None and optimize.last_block == "predictions"):
        of_output = trainer.loss_of(loaded, optimize.loss)
        yield Objective(
            kind="loss",
            iterations=optimize.iterations,
            loss=lambda inputs, targets, labels: of_output(inputs, targets)[0],
            errors=partial(error_sums, kind=optimize.loss),
        )
        return
    of_output, kernel = trainer.loss_of(loaded, "token"), job.compiled(prediction_error, False)
    with whole_epilogue(job.skeleton, job.activations.device, optimize.dtype) as of_tokens:
        to_logits = of_tokens(None)
        with job.events.span("likely tokens", block=loaded.index):
            tokens_V, places_X = _likely_tokens(job, loaded.index, to_logits)
        to_likely = of_tokens(tokens_V)

        def loss(inputs_NTD: Tensor, targets_NTD: Tensor, labels_NT: Tensor) -> Tensor:
            error, output_NTD = of_output(inputs_NTD, targets_NTD)
            labels_NT = places_X[labels_NT]
            predictions = prediction_loss(output_NTD, targets_NTD, labels_NT, optimize.label_weight, to_likely, kernel)
            return predictions + OUTPUT_WEIGHT * error

        yield Objective(
            kind="divergence",
            iterations=PREDICTION_STEPS * optimize.iterations,
            loss=loss,
            errors=partial(prediction_sums, to_logits=to_logits, kernel=kernel),
        )


@torch.no_grad()
def _likely_tokens(job: Job, block_index: int, to_logits: ToLogits) -> tuple[Tensor, Tensor]:
    """The tokens [V] that the fp model expects most over all ranks' samples, in the vocabulary's order.

    Returns:
        these tokens; and for every token of the vocabulary and for -1, its place among them, or -1 if it has none.
    """
    activations, head = job.activations, job.skeleton.head

    def load(sample: int) -> Tensor:
        return activations.load("fp", block_index + 1, [sample])[:, ::POSITION_STRIDE]

    expected_X = torch.zeros(head.out_features, device=activations.device)
    for _, hidden_NTD in activations.ahead(load, activations.samples):
        expected_X += summed_probabilities(hidden_NTD, to_logits)
    reduce_over_ranks(job.ranks, [expected_X])
    tokens_V = expected_X.topk(min(LIKELY_TOKENS, len(expected_X))).indices.sort().values
    places_X = torch.full((len(expected_X) + 1,), -1, device=activations.device)
    places_X[tokens_V] = torch.arange(len(tokens_V), device=activations.device)
    return tokens_V, places_X
