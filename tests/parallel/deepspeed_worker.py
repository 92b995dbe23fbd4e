"""One rank of the DeepSpeed tests: trains eight blocks in turn with one engine and writes down what came out.

Run by torchrun with a folder, an engine and whether to offload; `test_deepspeed_stepper.py` judges.
"""

import gc
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

from shardq.optimize.block_quantizer import BlockQuantizer
from shardq.optimize.distill import distill
from shardq.optimize.loss import distillation_loss
from shardq.optimize.options import OptimizeOptions
from shardq.optimize.stepper import Stepper
from shardq.parallel.deepspeed_stepper import DeepSpeedStepper
from shardq.parallel.options import ParallelOptions
from shardq.parallel.ranks import started
from shardq.quant.adascale import Kernels
from shardq.quant.quantized import QuantizedLinear
from shardq.quant.spec import QuantSpec

OPTIONS = OptimizeOptions(iterations=10, grid_lr=5e-3, weight_lr=2e-3)
NUM_BLOCKS, BATCH = 8, 4
WIDTH = 320  # s2 has more than DeepSpeed's 100 000 elements below which ZeRO 3 keeps parameters whole


def make_quantizer() -> tuple[nn.Sequential, BlockQuantizer]:
    """Two linears, of bfloat16 checkpoints, and their quantizers."""
    block = nn.Sequential(
        nn.Linear(WIDTH, WIDTH, bias=False), nn.GELU(), nn.Linear(WIDTH, 16, bias=False)
    ).requires_grad_(False)
    return block, BlockQuantizer(block, ["0", "2"], QuantSpec(bits=3), "adascale", Kernels(), torch.float32)


def make_source(block: nn.Module, number: int) -> dict[str, Tensor]:
    """Weights of block `number`, the same in every process."""
    generator = torch.Generator().manual_seed(number)
    return {
        name: (torch.randn(tensor.shape, generator=generator) / WIDTH**0.5).bfloat16()
        for name, tensor in block.state_dict().items()
    }


def make_batches(number: int) -> list[tuple[Tensor, Tensor]]:
    """The joined batches of block `number`, inputs [4, 3, WIDTH] and targets [4, 3, 16], the same in every process."""
    generator = torch.Generator().manual_seed(100 + number)
    inputs = torch.randn(OPTIONS.iterations, BATCH, 3, WIDTH, generator=generator)
    targets = torch.randn(OPTIONS.iterations, BATCH, 3, 16, generator=generator)
    return list(zip(inputs, targets, strict=True))


def train(
    block: nn.Module, quantizer: BlockQuantizer, stepper: Stepper, number: int, mine: slice
) -> dict[str, QuantizedLinear]:
    """Train block `number` on some of each batch's samples, one at a time."""
    quantizer.start(make_source(block, number), None, stepper.gathered)
    stepper.start()
    batches = [(inputs[mine], targets[mine]) for inputs, targets in make_batches(number)]
    distill(
        lambda inputs, targets: distillation_loss(block(inputs), targets), quantizer, stepper, batches, 1,
        on_step=lambda loss: None,
    )  # fmt: skip
    linears = quantizer.folded(stepper.gathered)
    quantizer.release()
    return linears


def tensors_of(linears: dict[str, QuantizedLinear]) -> dict[str, Tensor]:
    """Codes and scales by name."""
    codes = {f"{name}.codes": linear.codes_OI for name, linear in linears.items()}
    return codes | {f"{name}.scale": linear.scale_OG for name, linear in linears.items()}


def footprint(quantizer: BlockQuantizer) -> dict[str, int]:
    """What could grow from block to block."""
    gc.collect()
    tensors = [found for found in gc.get_objects() if isinstance(found, Tensor)]
    hooks = [
        len(table)
        for module in quantizer.modules()
        for table in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    ]
    return {
        "tensor bytes": sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values()),
        "groups": len(dist.distributed_c10d._world.pg_map),
        "hooks": sum(hooks),
    }


def main() -> None:
    """Train on this rank's samples."""
    folder, parallel = Path(sys.argv[1]), ParallelOptions(engine=sys.argv[2], offload=sys.argv[3] == "offload")
    with started("cpu") as ranks:
        block, quantizer = make_quantizer()
        quantizer.start(make_source(block, 0))
        stepper = DeepSpeedStepper(quantizer, OPTIONS, parallel, ranks)
        held = sum(parameter.numel() for parameter in quantizer.parameters())
        held += sum(
            0 if isinstance(linear.rows, nn.Parameter) else linear.rows.numel() for linear in quantizer.quantizers
        )
        footprints = []
        for number in range(NUM_BLOCKS):
            linears = train(block, quantizer, stepper, number, slice(ranks.rank, None, ranks.world_size))
            save_file(tensors_of(linears), folder / f"block-{number}-{ranks.rank}.safetensors")
            del linears
            footprints.append(footprint(quantizer))
        moments = sum(
            state["exp_avg"].numel() for state in stepper._optimizer.optimizer.state.values() if "exp_avg" in state
        )
        note = {"held": held, "moments": moments, "footprints": footprints}
        (folder / f"rank-{ranks.rank}.json").write_text(json.dumps(note))


if __name__ == "__main__":
    main()
