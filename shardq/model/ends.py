"""What stands before and after the blocks: tokens to hidden states, hidden states to logits.

Both run the model's own forward with stand-ins in the blocks' places, so embedding scales, learned positions, masks,
final norms and logit caps are the model's, whatever its architecture.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shardq.model.skeleton import Skeleton
from shardq.model.weights import materialised


@dataclass(frozen=True)
class BlockArguments:
    """What the model passes to one block beside the hidden states: mask, position embeddings, position ids, ..."""

    args: tuple
    kwargs: dict


def block_forward(block: nn.Module, arguments: BlockArguments) -> Callable[[Tensor], Tensor]:
    """Function from the hidden states [N, T, D] that enter a block to those that leave it."""

    def forward(hidden_NTD: Tensor) -> Tensor:
        output = block(hidden_NTD, *arguments.args, **arguments.kwargs)
        return output[0] if isinstance(output, tuple) else output

    return forward


@contextmanager
def prologue(skeleton: Skeleton, device: torch.device) -> Iterator[Callable[[Tensor], Tensor]]:
    """Yield a function from tokens [N, T] to the hidden states [N, T, D] that enter block 0.

    The embeddings are in memory while the body runs.
    """
    prefix = skeleton.model.base_model_prefix
    base = getattr(skeleton.model, prefix)

    @torch.no_grad()
    def embed(tokens_NT: Tensor) -> Tensor:
        base(input_ids=tokens_NT.to(device), use_cache=False)
        first = skeleton.stand_ins[0]
        hidden_NTD, _, _ = first.seen
        return hidden_NTD

    try:
        with materialised(skeleton, base, prefix, device):
            yield embed
    finally:
        _forget(skeleton)


def record_arguments(
    skeleton: Skeleton, embed: Callable[[Tensor], Tensor], sequence_length: int
) -> list[BlockArguments]:
    """Each block's arguments for sequences of `sequence_length` tokens; valid for any number of sequences.

    Args:
        embed: what `prologue` yields; called once on one sequence.
    """
    embed(torch.zeros(1, sequence_length, dtype=torch.long))
    return [BlockArguments(stand_in.seen[1], stand_in.seen[2]) for stand_in in skeleton.stand_ins]


@contextmanager
def epilogue(skeleton: Skeleton, device: torch.device) -> Iterator[Callable[[Tensor], Tensor]]:
    """Yield a function from the hidden states [N, T, D] after the last block to logits [N, T, vocabulary].

    Final norm and head are in memory while the body runs. Norm and head act on each position alone, so T may be any
    slice of a sequence.
    """
    last = skeleton.stand_ins[-1]

    @torch.no_grad()
    def to_logits(hidden_NTD: Tensor) -> Tensor:
        last.injected = hidden_NTD
        tokens_NT = torch.zeros(hidden_NTD.shape[:2], dtype=torch.long, device=device)
        return skeleton.model(input_ids=tokens_NT, use_cache=False).logits

    try:
        with materialised(skeleton, skeleton.model, "", device, unread=_untied_embedding(skeleton)):
            yield to_logits
    finally:
        last.injected = None
        _forget(skeleton)


def _untied_embedding(skeleton: Skeleton) -> frozenset[str]:
    """Stored name of the input embedding if the head has a matrix of its own: the epilogue ignores what it looks up."""
    embedding = skeleton.model.get_input_embeddings()
    prefix = next(name for name, module in skeleton.model.named_modules() if module is embedding)
    stored = skeleton.stored(f"{prefix}.weight").name
    uses = [name for name in skeleton.model.state_dict() if skeleton.stored(name).name == stored]
    return frozenset([stored]) if len(uses) == 1 else frozenset()


def _forget(skeleton: Skeleton) -> None:
    for stand_in in skeleton.stand_ins:
        stand_in.seen = None
