"""One rank of the engines' tests: trains five blocks in turn with each engine and writes down what came out.

Run by torchrun with a folder and the names of engines, such as `zero2-bf16-offload`; `test_steppers.py` judges.
"""

import ctypes
import gc
import itertools
import json
import re
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rank_process import run_and_leave
from shardq.matrix import matrices_in
from shardq.optimize.block_quantizer import BlockQuantizer
from shardq.optimize.distill import distill
from shardq.optimize.loss import distillation_loss
from shardq.optimize.options import OptimizeOptions
from shardq.optimize.share import Share
from shardq.optimize.stepper import OPTIMIZERS, Stepper
from shardq.parallel.engines import engine_for
from shardq.parallel.options import ParallelOptions
from shardq.parallel.ranks import Ranks, started
from shardq.parallel.zero import DeepSpeedStepper
from shardq.quant.adascale import Kernels
from shardq.quant.integer_grid import IntegerGrid
from shardq.quant.quantized import QuantizedLinear

OPTIONS = OptimizeOptions(iterations=10, grid_lr=5e-3, weight_lr=2e-3, optimizer="adam")
NUM_BLOCKS, BATCH = 5, 4
SETTINGS = Path(__file__).parents[2] / "configs" / "deepspeed"
WIDTH = 320  # s2 has more than DeepSpeed's 100 000 elements below which ZeRO 3 keeps parameters whole


def make_quantizer(share: Share | None = None) -> tuple[nn.Sequential, BlockQuantizer]:
    """Two linears, of bfloat16 checkpoints, and the quantizers of a share of them."""
    block = nn.Sequential(
        nn.Linear(WIDTH, WIDTH, bias=False), nn.GELU(), nn.Linear(WIDTH, 16, bias=False)
    ).requires_grad_(False)
    return block, BlockQuantizer(
        block, dict.fromkeys(matrices_in(block), IntegerGrid(bits=3)), "adascale", Kernels(), torch.float32, share
    )


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
    block: nn.Module,
    quantizer: BlockQuantizer,
    stepper: Stepper,
    number: int,
    mine: slice,
    steps: slice = slice(None),
    saved: dict[str, Tensor] | None = None,
    is_bad: Callable[[int], bool] = lambda call: False,
) -> dict[str, QuantizedLinear]:
    """Train block `number` on some of each batch's samples, one at a time.

    Args:
        steps: of all its batches, those to train on.
        saved: the stepper's state before the first of these.
        is_bad: whether the loss of a sample is infinite, by its number.
    """
    calls = itertools.count()

    def loss_of(inputs: Tensor, targets: Tensor) -> Tensor:
        return distillation_loss(block(inputs), targets) + (torch.inf if is_bad(next(calls)) else 0)

    quantizer.start(make_source(block, number), None, stepper.gathered)
    stepper.start(OPTIONS.iterations)
    if saved:
        stepper.restore(saved, steps.start)
    batches = [(inputs[mine], targets[mine]) for inputs, targets in make_batches(number)][steps]
    for _ in distill(loss_of, quantizer, stepper, batches, 1):
        pass
    linears = quantizer.folded(stepper.gathered)
    quantizer.serve(linears, lambda weight: weight)
    quantizer.release()
    return linears


def tensors_of(linears: dict[str, QuantizedLinear]) -> dict[str, Tensor]:
    """Codes and scales by name."""
    codes = {f"{name}.codes": linear.codes_OI for name, linear in linears.items()}
    return codes | {f"{name}.scale": linear.scale_OG for name, linear in linears.items()}


def optimizer_of(name: str) -> str:
    """The optimizer in a name such as `zero3-rms`; Adam where it has none."""
    named = OPTIMIZERS.keys() & set(name.split("-"))
    return named.pop() if named else "adam"


def make_engine(name: str, ranks: Ranks) -> tuple[nn.Sequential, BlockQuantizer, Stepper]:
    """Block, quantizer and stepper of what a name such as `zero2-bf16-offload` or `zero3-rms` stands for."""
    kind, *more = name.split("-")
    options = replace(OPTIONS, optimizer=optimizer_of(name))
    reduce_dtype = "bf16" if "bf16" in more else "float32"
    files = [str(file) for file in SETTINGS.iterdir() if file.stem in more]
    parallel = ParallelOptions(
        engine=kind, reduce_dtype=reduce_dtype, offload="offload" in more, deepspeed=files[0] if files else None
    )
    engine = engine_for(parallel, ranks)
    block, quantizer = make_quantizer(engine.share(torch.bfloat16))
    return block, quantizer, engine.stepper(quantizer, options)


def footprint(quantizer: BlockQuantizer, stepper: Stepper) -> dict[str, int]:
    """What could grow from block to block."""
    time.sleep(0.2)  # a collective's thread lets go of its tensors a moment after it is waited for
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    # before the list of all objects below, which takes megabytes itself
    resident = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text()).group(1)
    tensors = [found for found in gc.get_objects() if issubclass(type(found), Tensor)]
    tables = [table for module in quantizer.modules()
              for table in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)]  # fmt: skip
    tables += [parameter._post_accumulate_grad_hooks or {} for parameter in quantizer.parameters()]
    optimizer = getattr(stepper, "_optimizer", None)  # DeepSpeed's keeps its hooks on parameters itself
    tables += [hooks for name, hooks in vars(optimizer).items() if name.endswith("hooks") and hasattr(hooks, "__len__")]
    return {
        "tensor bytes": sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values()),
        "groups": len(dist.distributed_c10d._world.pg_map),
        "hooks": sum(map(len, tables)),
        "resident": int(resident) << 10,
    }


def moments_held(stepper: Stepper) -> int:
    """Elements of Adam's first moment, or of the sum of squares in its place, on this rank."""
    optimizer = stepper._optimizer
    states = getattr(optimizer, "optimizer", optimizer).state.values()  # DeepSpeed's wraps torch's
    return sum(state[kind].numel() for state in states for kind in ("exp_avg", "sum") if kind in state)


def copies_stepped(quantizer: BlockQuantizer, stepper: Stepper) -> int:
    """Elements that DeepSpeed steps beside the parameters, or their shards, themselves."""
    if not isinstance(stepper, DeepSpeedStepper):
        return 0
    held = [getattr(parameter, "ds_tensor", parameter) for parameter in quantizer.parameters()]
    own = {tensor.untyped_storage().data_ptr() for tensor in held}
    return sum(shard.numel() for shard in stepper._shards() if shard.untyped_storage().data_ptr() not in own)


class LargestDouble(TorchDispatchMode):
    """Elements of the largest float64 tensor that is made in the body."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """Compute as without the mode, and look at what comes out."""
        made = function(*args, **(kwargs or {}))
        doubles = (leaf for leaf in tree_leaves(made) if isinstance(leaf, Tensor) and leaf.dtype == torch.float64)
        self.elements = max([self.elements, *(double.numel() for double in doubles)])
        return made


def watch_steps(stepper: Stepper) -> dict[str, int]:
    """What DeepSpeed's steps make of gradients from here on, in elements: the largest in float64; those moved."""
    seen = {"double": 0, "moved": 0}
    if not isinstance(stepper, DeepSpeedStepper):
        return seen
    step, optimizer, places = stepper.step, stepper._optimizer, set()

    def watched() -> None:
        collected = itertools.chain(*filter(None, getattr(optimizer, "averaged_gradients", {}).values()))
        places.clear()  # of the step before, whose addresses may have been given out again
        places.update(gradient.untyped_storage().data_ptr() for gradient in collected)
        with LargestDouble() as largest:
            step()
        seen["double"] = max(seen["double"], largest.elements)

    def before_torch_steps(torch_optimizer: torch.optim.Optimizer, *_: object) -> None:
        gradients = [parameter.grad for group in torch_optimizer.param_groups for parameter in group["params"]]
        moved = (gradient for gradient in gradients if gradient.untyped_storage().data_ptr() not in places)
        seen["moved"] += sum(gradient.numel() for gradient in moved)

    stepper.step = watched
    optimizer.optimizer.register_step_pre_hook(before_torch_steps)
    return seen


def run_engine(name: str, ranks: Ranks, folder: Path) -> None:
    """Train all blocks with one engine on this rank's samples."""
    block, quantizer, stepper = make_engine(name, ranks)
    seen = watch_steps(stepper)
    quantizer.start(make_source(block, 0), None, stepper.gathered)
    held = sum(parameter.numel() for parameter in quantizer.parameters())
    held += sum(0 if isinstance(linear.rows, nn.Parameter) else linear.rows.numel() for linear in quantizer.quantizers)
    footprints = []
    for number in range(NUM_BLOCKS):
        stepper.release()
        linears = train(block, quantizer, stepper, number, slice(ranks.rank, None, ranks.world_size))
        save_file(tensors_of(linears), folder / f"{name}-block-{number}-{ranks.rank}.safetensors")
        del linears
        if number in (1, NUM_BLOCKS - 1):  # the first may still make what all need
            footprints.append(footprint(quantizer, stepper))
    note = {"stopped": leave_off(name, block, quantizer, stepper, ranks, folder)}
    note |= {"held": held, "moments": moments_held(stepper), "copies": copies_stepped(quantizer, stepper)}
    note |= {"footprints": footprints, "gradients": seen}
    (folder / f"{name}-rank-{ranks.rank}.json").write_text(json.dumps(note))


def leave_off(
    name: str, block: nn.Module, quantizer: BlockQuantizer, stepper: Stepper, ranks: Ranks, folder: Path
) -> list[bool]:
    """Train block 0 to its half, another one, and block 0 on from there; then to an infinite loss of the last rank.

    Gives whether all numbers were finite, before that and after it.
    """
    training = block, quantizer, stepper
    mine, half = slice(ranks.rank, None, ranks.world_size), OPTIONS.iterations // 2
    results = {"half": train(*training, 0, mine, slice(0, half))}
    saved = {name: tensor.clone() for name, tensor in stepper.state().items()}
    train(*training, 1, mine, slice(0, 1))
    results["resumed"] = train(*training, 0, mine, slice(half, None), saved)
    finite = [stepper.is_finite()]
    bad_call = half * BATCH // ranks.world_size  # the first sample of the step after the half
    is_last = ranks.rank == ranks.world_size - 1
    results["stopped"] = train(*training, 0, mine, slice(0, half + 2), is_bad=lambda call: is_last and call == bad_call)
    for kind, linears in results.items():
        save_file(tensors_of(linears), folder / f"{name}-{kind}-{ranks.rank}.safetensors")
    return [*finite, stepper.is_finite()]


def main() -> None:
    """Each engine in turn."""
    with started("cpu") as ranks:
        for name in sys.argv[2:]:
            run_engine(name, ranks, Path(sys.argv[1]))


if __name__ == "__main__":
    run_and_leave(main)
