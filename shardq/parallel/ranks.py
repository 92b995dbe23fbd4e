"""Who am I: rank, world size, device. Made once, passed down."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from shardq.errors import ConfigError

# Rank 0 may download a model or tokenize a large dataset while the others wait.
COLLECTIVE_TIMEOUT = timedelta(hours=2)


@dataclass(frozen=True)
class Ranks:
    """This process among those that torchrun started; a plain python process is rank 0 of 1.

    `local_world_size` is the number of ranks on this host, which share its memory.
    """

    rank: int
    world_size: int
    device: torch.device
    local_world_size: int = 1


@contextmanager
def started(device: str) -> Iterator[Ranks]:
    """Join the other ranks for the duration of the body.

    Args:
        device: `auto` (CUDA where there is one), `cpu` or `cuda`; rank r of a host takes its GPU r.

    Raises:
        ConfigError: CUDA is asked for and absent, or there are fewer GPUs than ranks on this host.
    """
    rank, world_size, local_rank, local_world_size = (
        int(os.environ.get(name, default))
        for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1))
    )
    ranks = Ranks(rank, world_size, _device(device, local_rank), local_world_size)
    if world_size == 1:
        yield ranks
        return
    # CPU tensors and Python objects travel over gloo also where GPUs have NCCL.
    backend = "cpu:gloo,cuda:nccl" if ranks.device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT)
    yield ranks
    # Not in a `finally`: after an error the other ranks may be gone, and leaving in order could wait for them.
    dist.destroy_process_group()


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
