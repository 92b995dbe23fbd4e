"""What stands before and after the blocks: tokens to hidden states, hidden states to logits.

Both run the model's own forward with stand-ins in the blocks' places, so embedding scales, learned positions, masks,
final norms and logit caps are the model's, whatever its architecture.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from shardq.formats.shards import TensorInfo, read_weight_rows
from shardq.model.skeleton import Skeleton
from shardq.model.weights import COMPUTE_DTYPE, materialised, read_source

HEAD_SLICE_BYTES = 256 << 20  # float32 rows of the head in memory at once


@dataclass(frozen=True)
class BlockArguments:
    """What the model passes to one block beside the hidden states: mask, position embeddings, position ids, ..."""

    args: tuple
    kwargs: dict


def run_block(block: nn.Module, hidden_NTD: Tensor, args: tuple, kwargs: dict, dtype: torch.dtype) -> Tensor:
    """Hidden states [N, T, D] that leave a block, float32.

    Args:
        args, kwargs: what the model passes beside the hidden states.
        dtype: of the matrix multiplies; norms, softmax and the residual stream stay in float32.
    """
    with _multiplying_in(dtype, hidden_NTD.device):
        output = block(hidden_NTD, *args, **kwargs)
    return (output[0] if isinstance(output, tuple) else output).float()


def _multiplying_in(dtype: torch.dtype, device: torch.device) -> AbstractContextManager:
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def block_forward(block: nn.Module, arguments: BlockArguments, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Function from the hidden states [N, T, D] that enter a block to those that leave it, float32."""
    return partial(run_block, block, args=arguments.args, kwargs=arguments.kwargs, dtype=dtype)


@contextmanager
def prologue(skeleton: Skeleton, device: torch.device) -> Iterator[Callable[[Tensor], Tensor]]:
    """Yield a function from tokens [N, T] to the hidden states [N, T, D] that enter block 0.

    Of the token embeddings only the rows that a call needs are in memory, while it lasts.
    """
    prefix = skeleton.model.base_model_prefix
    base, table = getattr(skeleton.model, prefix), skeleton.model.get_input_embeddings()
    stored = skeleton.stored(f"{_name_of(skeleton, table)}.weight")

    def read_rows(table: nn.Module, inputs: tuple) -> tuple:
        # The tokens are renumbered to index a table of their own embeddings alone.
        used, renumbered_NT = inputs[0].unique(return_inverse=True)
        table.weight = _frozen(read_weight_rows(stored, used.tolist()), device)
        return (renumbered_NT, *inputs[1:])

    @torch.no_grad()
    def embed(tokens_NT: Tensor) -> Tensor:
        base(input_ids=tokens_NT.to(device), use_cache=False)
        hidden_NTD, _, _ = skeleton.stand_ins[0].seen
        return hidden_NTD

    table.padding_idx = None  # torch would check it against the smaller table; it is for training alone
    hook = table.register_forward_pre_hook(read_rows)
    try:
        with materialised(skeleton, base, prefix, device, unread=frozenset([stored.name])):
            yield embed
    finally:
        hook.remove()
        _forget(skeleton)


def _name_of(skeleton: Skeleton, wanted: nn.Module) -> str:
    return next(name for name, module in skeleton.model.named_modules() if module is wanted)


def _frozen(tensor: Tensor, device: torch.device, dtype: torch.dtype = COMPUTE_DTYPE) -> nn.Parameter:
    return nn.Parameter(tensor.to(device, dtype), requires_grad=False)


def record_arguments(
    skeleton: Skeleton, embed: Callable[[Tensor], Tensor], sequence_length: int
) -> list[BlockArguments]:
    """Each block's arguments for sequences of `sequence_length` tokens; valid for any number of sequences.

    Args:
        embed: what `prologue` yields; called once on one sequence.

    Raises:
        UnsupportedModelError: a block's arguments hold for one sequence alone.
    """
    embed(torch.zeros(1, sequence_length, dtype=torch.long))
    for stand_in in skeleton.stand_ins:
        stand_in.on_meta(times=2)
    return [BlockArguments(stand_in.seen[1], stand_in.seen[2]) for stand_in in skeleton.stand_ins]


@contextmanager
def epilogue(skeleton: Skeleton, device: torch.device) -> Iterator[Iterator[tuple[int, Callable[[Tensor], Tensor]]]]:
    """Yield `(first, to_logits)` for one slice of the vocabulary after the other.

    `to_logits` takes the hidden states [N, T, D] after the last block to the logits [N, T, V] of the tokens from
    `first` on; the head's rows for them are in memory until the next slice is asked for. Norm and head act on each
    position alone, so T may be any slice of a sequence.
    """
    head = skeleton.model.get_output_embeddings()
    rows_a_slice = max(1, HEAD_SLICE_BYTES // (4 * head.in_features))
    with _last_layers(skeleton, device) as (infos, to_logits):

        def slices() -> Iterator[tuple[int, Callable[[Tensor], Tensor]]]:
            for first in range(0, head.out_features, rows_a_slice):
                rows = list(range(first, min(first + rows_a_slice, head.out_features)))
                for name, info in infos.items():
                    setattr(head, name, _frozen(read_weight_rows(info, rows), device))
                yield first, torch.no_grad()(to_logits)

        yield slices()


@contextmanager
def whole_epilogue(
    skeleton: Skeleton, device: torch.device, dtype: torch.dtype
) -> Iterator[Callable[[Tensor | None], Callable[[Tensor], Tensor]]]:
    """Yield what gives, for some tokens, a function from hidden states [N, T, D] after the last block to logits.

    That function is differentiable, and its logits [N, T, V] are those of the tokens [V] asked for, in their order, or
    of all where None is.

    Args:
        dtype: of the head, which is held whole, of its rows for some tokens, a copy, and of its matrix multiply.
    """
    head = skeleton.model.get_output_embeddings()
    with _last_layers(skeleton, device) as (infos, to_logits):
        whole = {name: _frozen(read_source(skeleton, info, False), device, dtype) for name, info in infos.items()}

        def of_tokens(tokens_V: Tensor | None) -> Callable[[Tensor], Tensor]:
            rows = whole
            if tokens_V is not None:
                rows = {name: _frozen(tensor[tokens_V], device, dtype) for name, tensor in whole.items()}

            def in_dtype(hidden_NTD: Tensor) -> Tensor:
                for name, tensor in rows.items():
                    setattr(head, name, tensor)
                with _multiplying_in(dtype, device):
                    return to_logits(hidden_NTD)

            return in_dtype

        yield of_tokens


@contextmanager
def _last_layers(
    skeleton: Skeleton, device: torch.device
) -> Iterator[tuple[dict[str, TensorInfo], Callable[[Tensor], Tensor]]]:
    """Yield where the head's parameters lie, by name, and what computes logits once the head has some."""
    model, last = skeleton.model, skeleton.stand_ins[-1]
    head = model.get_output_embeddings()
    prefix = _name_of(skeleton, head)
    infos = {name: skeleton.stored(f"{prefix}.{name}") for name, _ in head.named_parameters()}

    def to_logits(hidden_NTD: Tensor) -> Tensor:
        last.injected = hidden_NTD
        tokens_NT = torch.zeros(hidden_NTD.shape[:2], dtype=torch.long, device=device)
        return model(input_ids=tokens_NT, use_cache=False).logits

    # What the epilogue looks up in the input embedding is ignored, and the head is read by its users.
    embedding = skeleton.stored(f"{_name_of(skeleton, model.get_input_embeddings())}.weight")
    unread = frozenset([embedding.name, *(info.name for info in infos.values())])
    try:
        with materialised(skeleton, model, "", device, unread=unread):
            yield infos, to_logits
    finally:
        last.injected = None
        _forget(skeleton)


def _forget(skeleton: Skeleton) -> None:
    for stand_in in skeleton.stand_ins:
        stand_in.seen = None
