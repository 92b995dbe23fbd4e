"""One rank of the all-reduce stepper's tests: trains a block of its own samples and writes down what happened when.

Run by torchrun with a folder as its only argument; `test_allreduce_stepper.py` judges.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

from rank_process import end_apart, run_and_leave
from shardq.errors import RankError
from shardq.matrix import matrices_in
from shardq.optimize.block_quantizer import BlockQuantizer
from shardq.optimize.distill import distill
from shardq.optimize.loss import distillation_loss
from shardq.optimize.options import OptimizeOptions
from shardq.optimize.stepper import Stepper
from shardq.parallel.allreduce import BUCKET_SIZE, AllReduceStepper
from shardq.parallel.ranks import Ranks, started
from shardq.quant.adascale import Kernels, trained_weight_gradients
from shardq.quant.integer_grid import IntegerGrid

OPTIONS = OptimizeOptions(iterations=10, grid_lr=5e-3, weight_lr=2e-3, optimizer="adam")
WIDTH, INNER = 16, BUCKET_SIZE // 16  # s2 of both large linears is as large as a bucket


def make_block(kernels: Kernels) -> tuple[nn.Sequential, BlockQuantizer]:
    """A small linear, two large ones, and their quantizers at their start, the same in every process."""
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, INNER), nn.GELU(),
                          nn.Linear(INNER, WIDTH)).requires_grad_(False)  # fmt: skip
    source = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    quantizer = BlockQuantizer(
        block, dict.fromkeys(matrices_in(block), IntegerGrid(bits=3)), "adascale", kernels, torch.float32
    )
    quantizer.start(source)
    return block, quantizer


def make_batches() -> list[tuple[Tensor, Tensor]]:
    """The joined batches, inputs and targets [8, 10, WIDTH], the same in every process."""
    generator = torch.Generator().manual_seed(1)
    inputs, targets = torch.randn(2, OPTIONS.iterations, 8, 10, WIDTH, generator=generator)
    return list(zip(inputs, targets, strict=True))


def train(
    block: nn.Module, quantizer: BlockQuantizer, stepper: Stepper, batches: list[tuple[Tensor, Tensor]]
) -> dict[str, Tensor]:
    """Train with one sample at a time and give the parameters."""

    def loss_of(inputs: Tensor, targets: Tensor) -> Tensor:
        return distillation_loss(block(inputs), targets)

    stepper.start(OPTIONS.iterations)
    for _ in distill(loss_of, quantizer, stepper, batches, micro_batch=1):
        pass
    return {name: parameter.detach() for name, parameter in quantizer.named_parameters()}


def one_logged_step(ranks: Ranks) -> list:
    """One step in order: the size of a linear whose gradients are computed, or of a bucket that leaves."""
    log: list = []

    def backward(grad: Tensor, *more: object) -> tuple:
        log.append(["computed", grad.numel()])
        return trained_weight_gradients(grad, *more)

    block, quantizer = make_block(Kernels(backward=backward))
    stepper, all_reduce = AllReduceStepper(quantizer, OPTIONS, torch.float32, ranks.world_size), dist.all_reduce

    def logged(bucket: Tensor, *args: object, **kwargs: object) -> dist.Work:
        log.append(["left", bucket.numel()])
        return all_reduce(bucket, *args, **kwargs)

    dist.all_reduce = logged
    train(block, quantizer, stepper, make_batches()[:1])
    dist.all_reduce = all_reduce
    return log


def lost_in_training(*training: object) -> str:
    """What `train` says once the other rank is gone; nothing if it goes on."""
    try:
        train(*training)
    except RankError as error:
        return str(error)
    return ""


def main() -> None:
    """Everything on this rank's samples; then rank 0 steps alone."""
    folder = Path(sys.argv[1])
    with started("cpu") as ranks:
        mine = slice(ranks.rank, None, ranks.world_size)
        block, quantizer = make_block(Kernels())
        stepper = AllReduceStepper(quantizer, OPTIONS, torch.float32, ranks.world_size)
        batches = [(inputs[mine], targets[mine]) for inputs, targets in make_batches()]
        save_file(train(block, quantizer, stepper, batches), folder / f"trained-{ranks.rank}.safetensors")
        note = {"log": one_logged_step(ranks)}
        dist.barrier()
        end_apart(ranks, folder, note, lambda: note.update(lost=lost_in_training(block, quantizer, stepper, batches)))


if __name__ == "__main__":
    run_and_leave(main)
