#!/usr/bin/env python
"""Measures each engine's training step on a block of random weights: memory, bytes between ranks, seconds.

    python tools/bench/engines.py --shape 4096x14336x64x8 --tokens 128 --ranks 2

One JSON line an engine: `peak_bytes` of a step, the largest of all ranks', without what a process takes before the
block is there; the plan's `predicted_bytes` and their `ratio`; `sent_bytes` of a rank in a step, by the size of the
tensors that its collectives are given, and the formula's `expected_sent_bytes`; `seconds` of a step, median and best;
`waiting_share`, the part of it spent waiting for collectives; `resident_bytes`, the peak with all that a process takes.
"""

import argparse
import importlib
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from step import make_block, parse_shape
from torch import Tensor

from shardq.compiling import compiler, eager, why_not
from shardq.devices import multiplies_bf16
from shardq.logs import peak_rss_bytes
from shardq.matrix import matrices_in
from shardq.model.arguments import BlockArguments
from shardq.optimize.block_quantizer import BlockQuantizer
from shardq.optimize.distill import distill
from shardq.optimize.options import OptimizeOptions, resolved
from shardq.optimize.stepper import OPTIMIZERS
from shardq.parallel.collectives import barrier, max_over_ranks
from shardq.parallel.engine import BlockSize, Engine
from shardq.parallel.engines import engine_for
from shardq.parallel.options import ParallelOptions
from shardq.parallel.ranks import started
from shardq.parallel.zero import Zero
from shardq.quant.adascale import Kernels
from shardq.quant.integer_grid import IntegerGrid
from shardq.training.memory import LargestBlock, saved_bytes, training_bytes
from shardq.training.trainer import block_loss
from shardq.verbs import return_freed_tensors

WARM_UP_STEPS = 2  # the first makes the moments
COLLECTIVES = [
    name for name in dir(dist.ProcessGroup) if re.match(r"(?!__).*(gather|reduce|broadcast|all_to_all)", name)
]
CPU = torch.device("cpu")


@dataclass
class Traffic:
    """What collectives cost this rank: bytes sent as ring algorithms send them, seconds waited."""

    sent_bytes: float = 0.0
    seconds_waiting: float = 0.0


@contextmanager
def counted(world_size: int) -> Iterator[Traffic]:
    """Count the collectives that are called in the body, whoever calls them."""
    traffic = Traffic()
    with ExitStack() as stack:
        for name in COLLECTIVES:
            stack.enter_context(mock.patch.object(dist.ProcessGroup, name, _counting(name, traffic, world_size)))
        stack.enter_context(mock.patch.object(dist.Work, "wait", _timing(traffic)))
        yield traffic


def _counting(name: str, traffic: Traffic, world_size: int) -> Callable[..., dist.Work]:
    call, rounds = getattr(dist.ProcessGroup, name), 2 if name.startswith("allreduce") else 1

    def counting(group: dist.ProcessGroup, *args: object, **kwargs: object) -> dist.Work:
        whole = max(map(_bytes_of, args))  # of the two sides, the one that is reduced or gathered
        traffic.sent_bytes += rounds * (world_size - 1) / world_size * whole
        return call(group, *args, **kwargs)

    return counting


def _timing(traffic: Traffic) -> Callable[..., bool]:
    wait = dist.Work.wait

    def timing(work: dist.Work, *args: object) -> bool:
        start = time.perf_counter()
        result = wait(work, *args)
        traffic.seconds_waiting += time.perf_counter() - start
        return result

    return timing


def _bytes_of(argument: object) -> int:
    """Bytes of a tensor, or of all tensors in lists of any depth."""
    if isinstance(argument, Tensor):
        return argument.numel() * argument.itemsize
    return sum(map(_bytes_of, argument)) if isinstance(argument, list | tuple) else 0


def expected_sent_bytes(engine: Engine, dtype: torch.dtype, num_trained: int, num_weights: int) -> float:
    """What a rank sends in a step, by the engine's own account.

    `rows` gathers the quantized weight, in the matrix multiplies' `dtype`, and sends its gradient to the ranks that
    hold the rows. `allreduce` reduces the gradient of what is trained in the ring's two rounds, each (N - 1) / N of it;
    ZeRO in one, to the ranks that hold the shards, and gathers what was stepped in another. ZeRO 3 gathers s2, s3 and
    the 16-bit weight instead, for the forward and for the backward pass.
    """
    world_size, reduced = engine.ranks.world_size, engine.options.dtype.itemsize
    gradient, stepped = reduced * num_trained, 4 * num_trained
    sent = {
        "local": 0,
        "allreduce": 2 * gradient,
        "rows": num_weights * (dtype.itemsize + min(dtype.itemsize, reduced)),
        "zero1": gradient + stepped,
        "zero2": gradient + stepped,
        "zero3": gradient + 2 * (stepped + 2 * num_weights),
    }[engine.options.engine]
    return (world_size - 1) / world_size * sent


def start_new_peak() -> int:
    """Forget the peak of resident memory so far; give what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_rss_bytes()


def predicted_bytes(arguments: argparse.Namespace, options: OptimizeOptions, engine: Engine) -> int:
    """The plan's figure for samples taken one at a time."""
    shape, num_tokens = arguments.shape, arguments.tokens
    block, source, kwargs = make_block(shape, num_tokens, torch.device("meta"))
    largest = max(outputs * inputs for outputs, inputs in shape.linears.values())
    size = BlockSize(_bytes_of(list(source.values())), shape.num_weights, largest)
    sample = saved_bytes(block, BlockArguments(0, (), kwargs, shape.hidden), (1, num_tokens, shape.hidden))
    joined = replace(options, batch_size=arguments.samples * engine.ranks.world_size)
    ahead = 0 if arguments.alone else size.source
    return training_bytes(LargestBlock("", size, sample), joined, engine, 1) + ahead


def measure(arguments: argparse.Namespace, engine: Engine) -> dict:
    """Train some steps and give the figures, on every rank."""
    shape, tokens, parallel, ranks = arguments.shape, arguments.tokens, engine.options, engine.ranks
    asked = OptimizeOptions(iterations=1000, precision=arguments.precision, optimizer=arguments.optimizer)
    options = resolved(asked, bits=4, world_size=ranks.world_size, has_bf16=multiplies_bf16(CPU))
    if isinstance(engine, Zero):
        importlib.import_module("deepspeed")  # a library's memory is not the block's
    nothing = start_new_peak()
    block, source, kwargs = make_block(shape, tokens, CPU)
    ahead = [] if arguments.alone else [tensor.clone() for tensor in source.values()]  # the next block
    compiled = eager if arguments.compile == "off" or why_not(CPU) else compiler(CPU, lambda text: None)
    kernels = Kernels(*(compiled(kernel, True) for kernel in Kernels()))
    share = engine.share(next(iter(source.values())).dtype)
    quantizer = BlockQuantizer(
        block, dict.fromkeys(matrices_in(block), IntegerGrid(bits=4)), "adascale", kernels, options.dtype, share
    )
    stepper = engine.stepper(quantizer, options)
    quantizer.start(source, None, stepper.gathered)
    source.clear()
    stepper.start(options.iterations)
    loss = compiled(block_loss, False)

    def train(num_steps: int) -> list[float]:
        """The seconds at which each step ended."""
        batch = tuple(torch.randn(2, arguments.samples, tokens, shape.hidden))
        steps = distill(lambda some, wanted: loss(block, some, wanted, (), kwargs, options.dtype)[0], quantizer,
                        stepper, [batch] * num_steps, 1, mean_over=1)  # fmt: skip
        return [time.perf_counter() for _ in steps]

    train(WARM_UP_STEPS)
    barrier(ranks)
    start_new_peak()
    times = [time.perf_counter()]
    with counted(ranks.world_size) as traffic:
        times += train(arguments.iterations)
    resident = max_over_ranks(ranks, peak_rss_bytes())
    peak = max_over_ranks(ranks, peak_rss_bytes() - nothing)
    del ahead  # held until here
    predicted = predicted_bytes(arguments, options, engine)
    steps = [later - earlier for earlier, later in itertools.pairwise(times)]
    return {
        "engine": parallel.engine, "offload": parallel.offload, "reduce_dtype": parallel.reduce_dtype,
        "optimizer": options.optimizer,
        "ranks": ranks.world_size, "threads": torch.get_num_threads(), "precision": options.precision,
        "compiled": compiled is not eager, "weights": shape.num_weights, "tokens": tokens,
        "peak_bytes": int(peak), "predicted_bytes": predicted, "ratio": round(peak / predicted, 3),
        "resident_bytes": int(resident), "sent_bytes": round(traffic.sent_bytes / arguments.iterations),
        "expected_sent_bytes": round(expected_sent_bytes(
            engine, options.dtype, shape.num_trained, shape.num_weights)),
        "seconds": round(statistics.median(steps), 4), "best_seconds": round(min(steps), 4),
         "waiting_share": round(traffic.seconds_waiting / (times[-1] - times[0]), 3),
    }  # fmt: skip


def run_rank(arguments: argparse.Namespace) -> None:
    """Measure the one engine on this rank."""
    engine, *more = arguments.engines[0].split("-")
    reduce_dtype = "bf16" if "bf16" in more else "float32"
    parallel = ParallelOptions(
        engine=engine, reduce_dtype=reduce_dtype, offload="offload" in more, deepspeed=arguments.deepspeed
    )
    return_freed_tensors()
    torch.manual_seed(int(os.environ.get("RANK", 0)))
    with started("cpu") as ranks:
        row = measure(arguments, engine_for(parallel, ranks))
        if ranks.rank == 0:
            print(json.dumps(row), flush=True)


def launch(engine: str, arguments: argparse.Namespace) -> None:
    """Measure one engine in processes of its own."""
    ranks = 1 if engine == "local" else arguments.ranks
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), __file__,
               "--rank-of-launch", *sys.argv[1:], "--engines", engine]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": str(arguments.threads)}
    finished = subprocess.run(command, env=environment, check=False)
    if finished.returncode:
        sys.exit(f"tools/bench/engines.py: {engine} ended with code {finished.returncode}; its message is above")


def main() -> None:
    """Parse the command line; measure one engine after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shape", default="smollm2", type=parse_shape, help="smollm2, llama3-8b, llama3-70b or HxIxNxK"
    )
    parser.add_argument("--tokens", type=int, default=128, help="tokens of the sample that each rank takes a step")
    parser.add_argument("--samples", type=int, default=1, help="that each rank takes a step, one after the other")
    parser.add_argument("--engines", nargs="+", default=["local", "rows", "allreduce", "zero1", "zero2", "zero3"],
                        help="also with endings: zero2-offload, allreduce-bf16 (default: all six, plain)")  # fmt: skip
    parser.add_argument("--ranks", type=int, default=2, help="of all engines but local")
    parser.add_argument("--threads", type=int, default=1, help="of each rank")
    parser.add_argument("--iterations", type=int, default=3, help="steps to measure, after two")
    parser.add_argument("--precision", choices=["auto", "float32", "bf16"], default="auto")
    parser.add_argument("--optimizer", choices=list(OPTIMIZERS), help="default: the preset's")
    parser.add_argument("--compile", choices=["auto", "off"], default="auto")
    parser.add_argument("--deepspeed", help="DeepSpeed's settings for zero1 to zero3, a JSON file")
    parser.add_argument("--alone", action="store_true",
                        help="without the next block, which a run reads ahead only where there is room")  # fmt: skip
    parser.add_argument("--rank-of-launch", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank_of_launch:
        run_rank(arguments)
        return
    for engine in arguments.engines:
        launch(engine, arguments)


if __name__ == "__main__":
    main()
