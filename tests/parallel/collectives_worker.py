"""One rank of the collectives tests: does the work of every check and writes down what it got.

Run by torchrun with a folder as its only argument; `test_collectives.py` judges the notes.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

from shardq.errors import ConfigError, ShardQError, StorageError
from shardq.optimize.block_quantizer import BlockQuantizer
from shardq.optimize.distill import distill
from shardq.optimize.loss import distillation_loss
from shardq.optimize.options import OptimizeOptions
from shardq.optimize.stepper import Stepper
from shardq.parallel.allreduce_stepper import AllReduceStepper
from shardq.parallel.collectives import (
    add_over_ranks,
    average_gradients,
    barrier,
    max_over_ranks,
    on_every_host,
    on_rank_zero,
    shared_by_all,
    sum_over_ranks,
    together,
)
from shardq.parallel.ranks import Ranks, started
from shardq.quant.adascale import Kernels
from shardq.quant.spec import QuantSpec

OPTIONS = OptimizeOptions(iterations=10, grid_lr=5e-3, weight_lr=2e-3)
LATE_SECONDS = 0.5


def make_block() -> tuple[nn.Sequential, BlockQuantizer]:
    """Two linears and their quantizers at their start, the same in every process."""
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16)).requires_grad_(False)
    quantizer = BlockQuantizer(block, ["0", "2"], QuantSpec(bits=3), "adascale", Kernels(), torch.float32)
    quantizer.start({name: tensor.clone() for name, tensor in block.state_dict().items()})
    return block, quantizer


def make_batches() -> list[tuple[Tensor, Tensor]]:
    """The joined batches, inputs and targets [4, 10, 16], the same in every process."""
    generator = torch.Generator().manual_seed(1)
    inputs, targets = torch.randn(2, OPTIONS.iterations, 4, 10, 16, generator=generator)
    return list(zip(inputs, targets, strict=True))


def train(
    block: nn.Module, quantizer: BlockQuantizer, stepper: Stepper, batches: list[tuple[Tensor, Tensor]]
) -> dict[str, Tensor]:
    """Train with one sample at a time and give the parameters."""

    def loss_of(inputs: Tensor, targets: Tensor) -> Tensor:
        return distillation_loss(block(inputs), targets)

    stepper.start()
    distill(loss_of, quantizer, stepper, batches, micro_batch=1, on_step=lambda loss: None)
    return {name: parameter.detach() for name, parameter in quantizer.named_parameters()}


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
    gradients = [torch.full((2, 3), 1.0 + ranks.rank), torch.tensor([10.0, -4.0]) * ranks.rank]
    average_gradients(ranks, gradients)
    note["mean gradients"] = [gradient.tolist() for gradient in gradients]


def check_barrier(ranks: Ranks, note: dict) -> None:
    """Rank 1 comes late."""
    time.sleep(LATE_SECONDS * ranks.rank)
    note["barrier"] = {"arrived": time.time()}
    barrier(ranks)
    note["barrier"]["left"] = time.time()


def check_training(ranks: Ranks, folder: Path) -> None:
    """Data-parallel training on this rank's half of each batch."""
    mine = slice(ranks.rank, None, ranks.world_size)
    batches = [(inputs[mine], targets[mine]) for inputs, targets in make_batches()]
    block, quantizer = make_block()
    parameters = train(block, quantizer, AllReduceStepper(quantizer, OPTIONS, ranks), batches)
    save_file(parameters, folder / f"trained-{ranks.rank}.safetensors")


def check_lost_peer(ranks: Ranks, note: dict) -> None:
    """Every collective of rank 0 after rank 1 has left the group."""
    calls = {
        "waiting for rank 0": lambda: on_rank_zero(ranks, lambda: None),
        "comparing results": lambda: together(ranks, lambda: None),
        "adding up losses": lambda: sum_over_ranks(ranks, [1.0]),
        "comparing memory": lambda: max_over_ranks(ranks, 1.0),
        "adding up statistics": lambda: add_over_ranks(ranks, [torch.ones(2)]),
        "averaging gradients": lambda: average_gradients(ranks, [torch.ones(2)]),
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
        check_training(ranks, folder)
        if ranks.rank == 0:
            check_lost_peer(ranks, note)
        else:
            dist.destroy_process_group()  # its connections end in the middle of the run, though it lives
        (folder / f"rank-{ranks.rank}.json").write_text(json.dumps(note))
        sys.exit(0)  # rank 0 has no group left to take leave of


if __name__ == "__main__":
    main()
