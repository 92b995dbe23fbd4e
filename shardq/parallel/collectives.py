"""Agreement between ranks. With one rank every function here is the plain operation."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist

from shardq.errors import RankError, ShardQError
from shardq.parallel.ranks import Ranks

Result = TypeVar("Result")


def on_rank_zero(ranks: Ranks, work: Callable[[], Result]) -> Result:
    """Run `work` on rank 0 and give its result, or its error, to every rank. The result must be picklable."""
    outcome: list = [None, None]
    if ranks.rank == 0:
        outcome = _attempt(work)
    if ranks.world_size > 1:
        with _contact("waiting for rank 0"):
            dist.broadcast_object_list(outcome, src=0, device=torch.device("cpu"))
    return _settled(*outcome)


def together(ranks: Ranks, work: Callable[[], Result]) -> Result:
    """Run `work` on every rank; if it fails on any, every rank raises the error of the lowest failing rank."""
    result, error = _attempt(work)
    if ranks.world_size > 1:
        errors: list[ShardQError | None] = [None] * ranks.world_size
        with _contact("comparing results"):
            dist.all_gather_object(errors, error)
        error = next((found for found in errors if found is not None), None)
    return _settled(result, error)


def sum_over_ranks(ranks: Ranks, values: list[float]) -> list[float]:
    """Element-wise sum of numbers over ranks, in float64; the same bits on every rank."""
    if ranks.world_size == 1:
        return values
    tensor = torch.tensor(values, dtype=torch.float64)
    with _contact("adding up losses"):
        dist.all_reduce(tensor)
    return tensor.tolist()


def max_over_ranks(ranks: Ranks, value: float) -> float:
    """Largest of the ranks' numbers."""
    if ranks.world_size == 1:
        return value
    tensor = torch.tensor(value, dtype=torch.float64)
    with _contact("comparing memory"):
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.item()


def add_over_ranks(ranks: Ranks, tensors: list[torch.Tensor], doing: str = "adding up statistics") -> None:
    """Replace each tensor by its sum over ranks, in place; an error's message says what that was for."""
    if ranks.world_size > 1:
        with _contact(doing):
            for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
                work.wait()


def average_gradients(ranks: Ranks, gradients: list[torch.Tensor]) -> None:
    """Replace each gradient by its mean over ranks, in place."""
    add_over_ranks(ranks, gradients, "averaging gradients")
    for gradient in gradients:
        gradient.div_(ranks.world_size)


def barrier(ranks: Ranks) -> None:
    """Wait until every rank is here."""
    sum_over_ranks(ranks, [0.0])


def _attempt(work: Callable[[], Result]) -> list:
    try:
        return [work(), None]
    except ShardQError as error:
        return [None, error]


def _settled(result: Result, error: ShardQError | None) -> Result:
    if error is not None:
        error.agreed = True
        raise error
    return result


@contextmanager
def _contact(doing: str) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError) as error:
        # torch reports a lost peer as RuntimeError (gloo) or its subclasses (NCCL, time-out).
        reason = str(error).strip().splitlines()[0]
        raise RankError(f"lost contact with another rank while {doing} ({reason}); see that rank's message") from error
