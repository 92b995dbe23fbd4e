"""The model before and after the blocks: tokens to hidden states, hidden states to logits.

Both run the model's own forward with stand-ins in the blocks' places, so embedding scales, learned positions, masks,
final norms and logit caps are the model's, whatever its architecture.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from shardq.errors import UnsupportedModelError
from shardq.formats.source import SourceTensor, WeightSource
from shardq.model.block import multiplying_in
from shardq.model.own_code import own_code
from shardq.model.skeleton import Skeleton
from shardq.model.weights import COMPUTE_DTYPE, materialised

HEAD_SLICE_BYTES = 256 << 20  # float32 rows of the head in memory at once


@contextmanager
def prologue(skeleton: Skeleton, device: torch.device) -> Iterator[Callable[[Tensor], Tensor]]:
    """Yield a function from tokens [N, T] to the hidden states [N, T, D] that enter block 0.

    Every stand-in has then `seen` what the model passes to its block. Of tables that tokens index only the rows that a
    call needs are in memory, while it lasts.
    """
    base = skeleton.model.get_submodule(skeleton.base_name)
    tables = _token_tables(skeleton)
    blank = {table: _frozen(torch.tensor(torch.nan).expand(tensor.shape), device) for table, tensor in tables.items()}
    read_rows = partial(_reading_rows, skeleton.source, device)
    hooks = [table.register_forward_pre_hook(read_rows(tensor)) for table, tensor in tables.items()]
    hooks += [table.register_forward_hook(partial(_blank, blank[table])) for table in tables]
    unread = frozenset(tensor.name for tensor in tables.values())
    if base is skeleton.runner:
        unread |= {tensor.name for tensor in _head_tensors(skeleton).values()}

    @torch.no_grad()
    def embed(tokens_NT: Tensor) -> Tensor:
        with own_code(type(skeleton.model).__name__, "its own code fails on tokens before its blocks, or between them"):
            base(input_ids=tokens_NT.to(device), use_cache=False)
        return skeleton.stand_ins[0].seen[0]

    skeleton.head.forward = partial(_one_channel, skeleton.head)
    try:
        with materialised(skeleton, base, skeleton.base_name, device, unread=unread):
            for table in tables:
                table.weight = blank[table]
            yield embed
    finally:
        vars(skeleton.head).pop("forward")
        for hook in hooks:
            hook.remove()
        _forget(skeleton)


def _token_tables(skeleton: Skeleton) -> dict[nn.Embedding, SourceTensor]:
    """The embeddings that tokens index, the model's own and others made like it, and the tensors of their rows."""
    own = skeleton.embeddings
    return {
        module: skeleton.tensor(f"{name}.weight")
        for name, module in skeleton.model.named_modules()
        if type(module) is type(own) and module.num_embeddings == own.num_embeddings
    }


def _reading_rows(
    source: WeightSource, device: torch.device, tensor: SourceTensor
) -> Callable[[nn.Embedding, tuple], tuple]:
    """A hook that gives a table only the rows for the tokens of the call, and renumbers the tokens."""

    def read_rows(table: nn.Embedding, inputs: tuple) -> tuple:
        used, renumbered_NT = inputs[0].unique(return_inverse=True)
        table.weight = _frozen(source.read_rows(tensor, used.tolist()), device)
        table.padding_idx = None  # torch would check it against the smaller table; it matters only in training
        return (renumbered_NT,)

    return read_rows


def _blank(weight: nn.Parameter, table: nn.Embedding, inputs: tuple, output: Tensor) -> None:
    """A hook that removes a table's rows: code that reads the table outside the lookup gets NaN, not wrong rows."""
    table.weight = weight


def _one_channel(head: nn.Linear, hidden_NTD: Tensor) -> Tensor:
    """A head's forward that costs nothing, for models whose part that takes tokens contains it."""
    return hidden_NTD[..., :1].expand(*hidden_NTD.shape[:-1], head.out_features)


def _name_of(skeleton: Skeleton, wanted: nn.Module) -> str:
    return next(name for name, module in skeleton.model.named_modules() if module is wanted)


def _frozen(tensor: Tensor, device: torch.device, dtype: torch.dtype = COMPUTE_DTYPE) -> nn.Parameter:
    return nn.Parameter(tensor.to(device, dtype), requires_grad=False)


def _head_tensors(skeleton: Skeleton) -> dict[str, SourceTensor]:
    """The source's tensors for the head's parameters, by their names in it."""
    prefix = _name_of(skeleton, skeleton.head)
    return {name: skeleton.tensor(f"{prefix}.{name}") for name, _ in skeleton.head.named_parameters()}


@contextmanager
def epilogue(skeleton: Skeleton, device: torch.device) -> Iterator[Iterator[tuple[int, Callable[[Tensor], Tensor]]]]:
    """Yield `(first, to_logits)` for one slice of the vocabulary after the other.

    `to_logits` computes from the hidden states [N, T, D] after the last block the logits [N, T, V] of the tokens from
    `first` on; the head's rows for them are in memory until the next slice is asked for. Norm and head treat each
    position separately, so T may be any slice of a sequence.
    """
    head = skeleton.head
    rows_a_slice = max(1, HEAD_SLICE_BYTES // (4 * head.in_features))
    with _last_layers(skeleton, device) as (tensors, to_logits):

        def slices() -> Iterator[tuple[int, Callable[[Tensor], Tensor]]]:
            for first in range(0, head.out_features, rows_a_slice):
                rows = list(range(first, min(first + rows_a_slice, head.out_features)))
                for name, tensor in tensors.items():
                    setattr(head, name, _frozen(skeleton.source.read_rows(tensor, rows), device))
                yield first, torch.no_grad()(to_logits)

        yield slices()


@contextmanager
def whole_epilogue(
    skeleton: Skeleton, device: torch.device, dtype: torch.dtype
) -> Iterator[Callable[[Tensor | None], Callable[[Tensor], Tensor]]]:
    """Yield a function that makes, for some tokens, a function from hidden states after the last block to logits.

    That function, from [N, T, D] to [N, T, V], is differentiable; its logits are those of the tokens [V] asked for, in
    their order, or for None those of all tokens.

    Args:
        dtype: dtype of the head, which is in memory whole, of a copy of its rows for some tokens, and of its product.
    """
    head = skeleton.head
    with _last_layers(skeleton, device) as (tensors, to_logits):
        read = skeleton.source.read
        whole = {name: _frozen(read(tensor), device, dtype) for name, tensor in tensors.items()}

        def of_tokens(tokens_V: Tensor | None) -> Callable[[Tensor], Tensor]:
            rows = whole
            if tokens_V is not None:
                rows = {name: _frozen(tensor[tokens_V], device, dtype) for name, tensor in whole.items()}

            def in_dtype(hidden_NTD: Tensor) -> Tensor:
                for name, tensor in rows.items():
                    setattr(head, name, tensor)
                with multiplying_in(dtype, device):
                    return to_logits(hidden_NTD)

            return in_dtype

        yield of_tokens


@contextmanager
def _last_layers(
    skeleton: Skeleton, device: torch.device
) -> Iterator[tuple[dict[str, SourceTensor], Callable[[Tensor], Tensor]]]:
    """Yield the head's parameters in the source, by name, and what computes logits once the head has some."""
    runner, head, last = skeleton.runner, skeleton.head, skeleton.stand_ins[-1]
    tensors = _head_tensors(skeleton)
    has_slices = False

    def to_logits(hidden_NTD: Tensor) -> Tensor:
        nonlocal has_slices
        if len(head.weight) < head.out_features and not has_slices:
            _check_tokens_are_alike(skeleton, partial(computed, hidden_NTD[:1, :1].detach()))
            has_slices = True
        return computed(hidden_NTD)

    def computed(hidden_NTD: Tensor) -> Tensor:
        last.injected = hidden_NTD
        tokens_NT = torch.zeros(hidden_NTD.shape[:2], dtype=torch.long, device=device)
        with own_code(type(runner).__name__, "its own code fails after its blocks"):
            return runner(input_ids=tokens_NT, use_cache=False).logits

    # What the epilogue looks up in the embeddings is ignored, and the head is read by its users.
    tables = _token_tables(skeleton).values()
    unread = frozenset(tensor.name for tensor in (*tables, *tensors.values()))
    try:
        with materialised(skeleton, runner, skeleton.runner_name, device, unread=unread):
            yield tensors, to_logits
    finally:
        last.injected = None
        _forget(skeleton)


@torch.no_grad()
def _check_tokens_are_alike(skeleton: Skeleton, to_logits: Callable[[], Tensor]) -> None:
    """Check that the code after the head treats all tokens alike: from a slice of the head it cannot tell which it has.

    Args:
        to_logits: computes logits of the vocabulary.

    Raises:
        UnsupportedModelError: it changes the logits of some tokens only.
    """
    head = skeleton.head
    head.forward = lambda hidden_NTD: _one_channel(head, hidden_NTD).contiguous()  # it may be written to
    try:
        logits_NTV = to_logits()
    finally:
        vars(head).pop("forward")
    if not torch.allclose(logits_NTV, logits_NTV[..., :1].expand_as(logits_NTV), equal_nan=True):
        raise UnsupportedModelError(
            f"{type(skeleton.model).__name__}: what follows its head changes the logits of some tokens only; such "
            "models are not supported yet"
        )


def _forget(skeleton: Skeleton) -> None:
    for stand_in in skeleton.stand_ins:
        stand_in.seen = None
