"""The identity of this process: rank, world size, device. Made once, passed down."""

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta

import torch
import torch.distributed as dist

from shardq.errors import ConfigError, RankError
from shardq.liveness.meeting import meeting_store
from shardq.liveness.stall import Pace
from shardq.liveness.watch import ended_together
from shardq.logs import seconds_since_process_start

# Rank 0 may download a model or tokenize a large dataset while the others wait. The watch finds a rank that is gone or
# stopped long before this time-out.
COLLECTIVE_TIMEOUT = timedelta(hours=2)


@dataclass(frozen=True)
class Ranks:
    """This process among those that torchrun started; a plain python process is rank 0 of 1.

    `local_world_size` is the number of ranks on this host, which share its memory; `local_rank` is this rank's number
    among them. Loops of the main thread report their steps to `pace`. `start_up_seconds` is the age of the process
    when it joined; 0 in a process that does other work than this command.
    """

    rank: int
    world_size: int
    device: torch.device
    local_world_size: int = 1
    local_rank: int = 0
    pace: Pace = field(default_factory=Pace)
    start_up_seconds: float = 0.0

    @property
    def first_on_host(self) -> int:
        """The rank that does the work that each host needs once; torchrun numbers the ranks host by host."""
        return self.rank - self.local_rank


def this_rank() -> str:
    """Name of this process in lines and errors: `rank 3`, on several hosts `rank 3 on HOST`; empty for one rank."""
    rank, world_size, _, local_world_size = _place()
    if world_size == 1:
        return ""
    return f"rank {rank}" + (f" on {socket.gethostname()}" if local_world_size < world_size else "")


@contextmanager
def started(device: str) -> Iterator[Ranks]:
    """Join the other ranks for the duration of the body; if one of them ends early, all end.

    Args:
        device: `auto` (CUDA where there is one), `cpu` or `cuda`; rank r of a host takes its GPU r.

    Raises:
        ConfigError: CUDA is asked for and absent, or there are fewer GPUs than ranks on this host.
        RankError: the other ranks do not arrive in time or cannot be reached.
    """
    rank, world_size, local_rank, local_world_size = _place()
    age = seconds_since_process_start()
    if world_size == 1:
        yield Ranks(rank, world_size, _device(device, local_rank), local_world_size, start_up_seconds=age)
        return
    store = meeting_store(rank, world_size)
    with ended_together(this_rank(), rank, world_size, store) as pace:
        chosen = _device(device, local_rank)
        ranks = Ranks(rank, world_size, chosen, local_world_size, local_rank, start_up_seconds=age)
        if ranks.device.type == "cpu":  # on a GPU a step that waits for other ranks looks like one that computes
            ranks = replace(ranks, pace=pace)
        _init_process_group(ranks, dist.PrefixStore("group", store))
        _leave_after_tracebacks()
        yield ranks
        # Not in a `finally`: after an error the other ranks may be gone, and an orderly exit could wait for them.
        dist.destroy_process_group()


@contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """Join the other ranks as `started` does, in a process that goes on after the body, even when the body fails.

    An existing process group is used and left in place; a missing one is made, and destroyed after the body. No rank
    watches the others: the next collective finds a failed rank, or torchrun ends all of them.

    Raises:
        ConfigError: as `started`; or an existing process group lacks what the ranks need.
        RankError: as `started`.
    """
    rank, world_size, local_rank, local_world_size = _place()
    if dist.is_initialized():
        rank, world_size = dist.get_rank(), dist.get_world_size()
        _check_process_group(world_size)
    ranks = Ranks(rank, world_size, _device(device, local_rank), local_world_size, local_rank)
    if world_size == 1 or dist.is_initialized():
        yield ranks
        return
    store, show = meeting_store(rank, world_size), sys.excepthook
    calls = store.add(f"calls-{rank}", 1)  # a former call's group has left its addresses in the store
    try:
        _init_process_group(ranks, dist.PrefixStore(f"group-{calls}", store))
        yield ranks
    finally:
        sys.excepthook = show  # init_process_group has installed torch's own
        if dist.is_initialized():
            dist.destroy_process_group()


def _init_process_group(ranks: Ranks, store: dist.Store) -> None:
    with contact("meeting it"):
        dist.init_process_group(
            backend_for(ranks.device),
            store=store,
            rank=ranks.rank,
            world_size=ranks.world_size,
            timeout=COLLECTIVE_TIMEOUT,
        )


def _check_process_group(world_size: int) -> None:
    """Check that the calling program's process group supports the same operations as ours."""
    if world_size > 1 and "cpu:" not in dist.get_backend_config():
        raise ConfigError(
            f"process group: {dist.get_backend()} has no backend for CPU tensors; "
            "make it with init_process_group('cpu:gloo,cuda:nccl'), or leave it to shardq"
        )
    if world_size > 1 and not {"LOCAL_RANK", "LOCAL_WORLD_SIZE"} <= os.environ.keys():
        raise ConfigError(
            "process group: LOCAL_RANK and LOCAL_WORLD_SIZE, which say what shares a host, are not in the environment; "
            "start with torchrun, or set them"
        )


def backend_for(device: torch.device) -> str:
    """Torch's backends for a device: CPU tensors and Python objects go over gloo even where GPUs use NCCL."""
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


@contextmanager
def contact(doing: str) -> Iterator[None]:
    """Turn torch's errors about other ranks into a RankError."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        # Torch reports a lost peer as RuntimeError (gloo) or as a subclass of it (NCCL, time-out).
        reason = str(error).strip().splitlines()[0]
        raise RankError(f"lost contact with another rank while {doing} ({reason}); see that rank's message") from error


def _place() -> tuple[int, int, int, int]:
    """Torchrun's environment: rank, world size, rank on this host, ranks on this host."""
    defaults = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    return tuple(int(os.environ.get(name, default)) for name, default in defaults.items())


def _leave_after_tracebacks() -> None:
    """End this process as soon as the traceback of an unexpected exception is printed.

    An orderly shutdown of a broken process group may wait for ranks that are gone.
    """
    show = sys.excepthook  # torch's hook, which puts the rank before every line

    def show_and_leave(*error: object) -> None:
        show(*error)
        os._exit(1)

    sys.excepthook = show_and_leave


def _device(name: str, local_rank: int) -> torch.device:
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("device: cuda is asked for, but torch sees no GPU here; use --device cpu")
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"device: {torch.cuda.device_count()} GPUs on this host, but local rank {local_rank} needs one of its own; "
            "lower torchrun --nproc-per-node"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device
