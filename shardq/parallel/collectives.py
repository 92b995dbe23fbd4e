"""Operations in which all ranks take part. With one rank each is the plain operation."""

import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Literal, TypeVar

import torch
import torch.distributed as dist

from shardq.errors import ShardQError, StorageError
from shardq.files import ASIDE, remove, write_text
from shardq.parallel.ranks import Ranks, contact, this_rank

Result = TypeVar("Result")
TOKEN = f"token-*{ASIDE}"  # files by which ranks find out whether they share a folder


def on_rank_zero(ranks: Ranks, work: Callable[[], Result]) -> Result:
    """Run `work` on rank 0 and give its result, or its error, to every rank. The result must be picklable."""
    outcome: list = [None, None]
    if ranks.rank == 0:
        outcome = _attempt(work)
    if ranks.world_size > 1:
        with contact("waiting for rank 0"):
            dist.broadcast_object_list(outcome, src=0, device=torch.device("cpu"))
    return _settled(*outcome)


def together(ranks: Ranks, work: Callable[[], Result]) -> Result:
    """Run `work` on every rank; if it fails on any, every rank raises the error of the lowest failing rank."""
    result, error = _attempt(work)
    if ranks.world_size > 1:
        outcomes = gathered(ranks, (error, this_rank()))
        failed = [(found, name) for found, name in outcomes if found is not None]
        if failed:
            error, name = failed[0]
            error.where = name if len(failed) < ranks.world_size else ""
    return _settled(result, error)


def on_every_host(ranks: Ranks, work: Callable[[], Result]) -> Result:
    """Run `work` on the first rank of every host and give its result to the ranks of that host; it must be picklable.

    If it fails on any host, every rank raises the error.
    """
    result = together(ranks, lambda: work() if ranks.local_rank == 0 else None)
    return gathered(ranks, result)[ranks.first_on_host]


def shared_by_all(ranks: Ranks, folder: Path) -> None:
    """Check that every rank sees the same folder: rank 0 writes a token file into it, and every rank reads it.

    Raises:
        StorageError: a rank does not find the token; names the rank and its host.
    """
    if ranks.world_size == 1:
        return
    token, author = on_rank_zero(ranks, lambda: (secrets.token_hex(16), this_rank()))
    path = folder / TOKEN.replace("*", token)  # a new name: a network disk may remember that an old one was absent

    def find() -> None:
        if not path.is_file() or path.read_text(encoding="utf-8") != token:
            raise StorageError(
                f"{folder}: {this_rank()} does not find there what {author} has written; "
                "--output must be one folder that all hosts share, under the same path"
            )

    on_rank_zero(ranks, lambda: write_text(path, token))
    try:
        together(ranks, find)
    finally:
        if ranks.rank == 0:
            remove(path)


def sum_over_ranks(ranks: Ranks, values: list[float]) -> list[float]:
    """Element-wise sum of numbers over ranks, in float64; the same bits on every rank."""
    sums = torch.tensor(values, dtype=torch.float64)
    reduce_over_ranks(ranks, [sums])
    return sums.tolist()


def max_over_ranks(ranks: Ranks, value: float) -> float:
    """Largest of the ranks' numbers."""
    largest = torch.tensor(value, dtype=torch.float64)
    reduce_over_ranks(ranks, [largest], "max")
    return largest.item()


def reduce_over_ranks(
    ranks: Ranks, tensors: list[torch.Tensor], reduction: Literal["sum", "min", "max"] = "sum"
) -> None:
    """Replace each tensor by its sum, least or greatest over ranks, element by element and in place."""
    operation = {"sum": dist.ReduceOp.SUM, "min": dist.ReduceOp.MIN, "max": dist.ReduceOp.MAX}[reduction]
    if ranks.world_size > 1:
        with contact("putting numbers together"):
            for work in [dist.all_reduce(tensor, op=operation, async_op=True) for tensor in tensors]:
                work.wait()


def barrier(ranks: Ranks) -> None:
    """Wait until every rank has called this function."""
    sum_over_ranks(ranks, [0.0])


def gathered(ranks: Ranks, value: Result) -> list[Result]:
    """Every rank's value, on every rank; it must be picklable."""
    if ranks.world_size == 1:
        return [value]
    values: list = [None] * ranks.world_size
    with contact("comparing results"):
        dist.all_gather_object(values, value)
    return values


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
