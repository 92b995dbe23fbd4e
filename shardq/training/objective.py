"""What a block is trained to, and judged by: the fp block's output or, of the last block, what the model predicts."""

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
"""Kinds of objective, and what users read of one: the loss before and after training."""

OUTPUT_WEIGHT = 30.0  # of the output's relative error; divergence alone does worse on held-out text (measured)
LIKELY_TOKENS = 8192  # of the vocabulary, to whose predictions the last block is trained; as good as all (measured)
POSITION_STRIDE = 4  # one position in four is read to find the likely tokens
PREDICTION_STEPS = 2  # times as many as the other blocks'; with that weight more steps still gain (measured)


@dataclass(frozen=True, kw_only=True)
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
def objective_of(job: Job, trainer: BlockTrainer, loaded: LoadedBlock) -> Iterator[Objective]:
    """Yield a block's objective; the model's head is in memory meanwhile where it is needed."""
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
        beside them, for every token of the vocabulary and for -1, its place among them, or -1 where it has none.
    """
    activations, head = job.activations, job.skeleton.model.get_output_embeddings()

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
