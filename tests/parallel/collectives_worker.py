"""One rank of the collectives tests: does the work of every check and writes down what it got.

Run by torchrun with a folder as its only argument; `test_collectives.py` judges the notes.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from rank_process import end_apart, run_and_leave
from shardq.errors import ConfigError, ShardQError, StorageError
from shardq.parallel.collectives import (
    barrier,
    max_over_ranks,
    on_every_host,
    on_rank_zero,
    reduce_over_ranks,
    shared_by_all,
    sum_over_ranks,
    together,
)
from shardq.parallel.ranks import Ranks, started

LATE_SECONDS = 0.5


def outcome(work: Callable[[], object]) -> dict:
    """What a call gave: its result, or its error's class, text and whether the ranks agree on it."""
    try:
        return {"result": work()}
    except ShardQError as error:
        return {"error": type(error).__name__, "text": str(error), "agreed": error.agreed, "where": error.where}


def fail(error: ShardQError) -> None:
    """Raise, where a lambda cannot."""
    raise error


def check_agreement(ranks: Ranks, note: dict) -> None:
    """Results and errors that ranks share."""
    calls: list[int] = []
    note["from rank 0"] = outcome(lambda: on_rank_zero(ranks, lambda: calls.append(ranks.rank) or {"of": ranks.rank}))
    note["calls of rank 0's work"] = len(calls)
    note["nothing from rank 0"] = outcome(lambda: on_rank_zero(ranks, lambda: None))
    note["error of rank 0"] = outcome(lambda: on_rank_zero(ranks, lambda: fail(StorageError("disk of rank 0 is full"))))
    note["own results"] = outcome(lambda: together(ranks, lambda: f"rank {ranks.rank}"))
    error = ConfigError(f"rank {ranks.rank} fails")
    note["error of rank 1"] = outcome(lambda: together(ranks, lambda: fail(error) if ranks.rank == 1 else "fine"))
    note["errors of both"] = outcome(lambda: together(ranks, lambda: fail(error)))


def check_hosts(ranks: Ranks, note: dict, folder: Path) -> None:
    """What is done once a host, and folders that are one for all ranks or are not."""
    apart = replace(ranks, local_rank=0)  # as if each rank had a host of its own
    together_here = replace(ranks, local_rank=ranks.rank)
    for name, placed in (("one host", together_here), ("two hosts", apart)):
        note[name] = outcome(lambda placed=placed: on_every_host(placed, lambda: f"of rank {ranks.rank}"))
    error = StorageError("no model on the second host")
    note["error of a host"] = outcome(lambda: on_every_host(apart, lambda: fail(error) if ranks.rank else "fine"))
    own = folder / f"own-{ranks.rank}"
    own.mkdir()
    note["shared folder"] = outcome(lambda: shared_by_all(ranks, folder))
    note["own folders"] = outcome(lambda: shared_by_all(ranks, own))
    note["left in own folders"] = [path.name for path in own.iterdir()]


def check_numbers(ranks: Ranks, note: dict) -> None:
    """Sums, maxima, means."""
    note["sums"] = sum_over_ranks(ranks, [0.1 + 0.1 * ranks.rank, 2.0**53 * ranks.rank, -5.0])
    note["largest"] = max_over_ranks(ranks, 3.5 - ranks.rank)
    statistics = [torch.full((2, 3), 1.0 + ranks.rank), torch.tensor([10.0, -4.0]) * ranks.rank]
    reduce_over_ranks(ranks, statistics)
    note["added"] = [tensor.tolist() for tensor in statistics]
    for reduction in ("min", "max"):
        values = [torch.tensor([1.0, -2.0]) * (1 - 2 * ranks.rank), torch.tensor(5 + ranks.rank)]
        reduce_over_ranks(ranks, values, reduction)
        note[reduction] = [tensor.tolist() for tensor in values]


def check_barrier(ranks: Ranks, note: dict) -> None:
    """Rank 1 comes late."""
    time.sleep(LATE_SECONDS * ranks.rank)
    note["barrier"] = {"arrived": time.time()}
    barrier(ranks)
    note["barrier"]["left"] = time.time()


def check_lost_peer(ranks: Ranks, note: dict) -> None:
    """Every collective of rank 0 after rank 1 has left the group."""
    calls = {
        "waiting for rank 0": lambda: on_rank_zero(ranks, lambda: None),
        "comparing results": lambda: together(ranks, lambda: None),
        "putting numbers together": lambda: barrier(ranks),
    }
    note["lost"] = {doing: outcome(call) for doing, call in calls.items()}


def main() -> None:
    """Do everything on this rank."""
    folder, note = Path(sys.argv[1]), {}
    with started("cpu") as ranks:
        note["ranks"] = [ranks.rank, ranks.world_size, str(ranks.device)]
        check_agreement(ranks, note)
        check_hosts(ranks, note, folder)
        check_numbers(ranks, note)
        check_barrier(ranks, note)
        end_apart(ranks, folder, note, lambda: check_lost_peer(ranks, note))


if __name__ == "__main__":
    run_and_leave(main)
