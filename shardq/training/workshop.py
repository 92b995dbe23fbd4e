"""What trains blocks of one kind, built for the first of them, and the job that all blocks of a run share."""

import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn.attention import sdpa_kernel

from shardq.calib.partition import largest_part
from shardq.compiling import Compile, apart
from shardq.devices import training_attention
from shardq.logs import Display, Events
from shardq.model.arguments import Entering, hidden_of
from shardq.model.block import BlockPlan, LoadedBlock, run_block
from shardq.model.skeleton import Skeleton
from shardq.optimize.block_quantizer import BlockQuantizer
from shardq.optimize.distill import distill
from shardq.optimize.loss import Loss, distillation_loss
from shardq.optimize.options import OptimizeOptions
from shardq.optimize.rounded_inputs import RoundedInputs
from shardq.optimize.stepper import Stepper
from shardq.parallel.engine import Engine
from shardq.parallel.ranks import Ranks
from shardq.quant import adascale
from shardq.quant.options import ActivationOptions
from shardq.training.checkpoint import Checkpoints
from shardq.training.passes import Activations, Forward


@dataclass(frozen=True)
class Bench:
    """What trains blocks of one kind: built for the first of them, started anew for each."""

    quantizer: BlockQuantizer
    stepper: Stepper | None  # None where nothing is trained
    loss: Callable[..., tuple[Tensor, Tensor]]
    inputs: RoundedInputs


@dataclass(frozen=True)
class BlockJob:
    """What quantizing a block needs beside the block, the same for all blocks of a run.

    `tokens_NT` are the calibration samples. `encodings` says how activations get their grids. `benches` fills up as
    kinds of blocks are met; its keys are the shared module and the grids of the
    matrices quantized in it.
    """

    skeleton: Skeleton
    seed: int
    method: str
    optimize: OptimizeOptions
    engine: Engine
    tokens_NT: Tensor
    stored: Callable[[Tensor], Tensor]
    encodings: ActivationOptions
    activations: Activations
    ranks: Ranks
    events: Events
    display: Display
    compiled: Compile
    checkpoints: Checkpoints
    benches: dict[tuple, Bench] = field(default_factory=dict)

    @property
    def num_samples(self) -> int:
        """Calibration samples over all ranks."""
        return len(self.tokens_NT)

    @property
    def samples_at_once(self) -> int:
        """Samples that go through a block at once in training."""
        return min(self.optimize.micro_batch, largest_part(self.optimize.batch_size, self.ranks.world_size))

    @cached_property
    def block_loss(self) -> Callable[..., tuple[Tensor, Tensor]]:
        """`block_loss`, compiled where this job compiles."""
        return self.compiled(block_loss, False)

    def trains(self, plan: BlockPlan) -> bool:
        """Whether there is anything to train in a block."""
        return self.method != "rtn" and bool(plan.grids)


def bench_for(job: BlockJob, loaded: LoadedBlock) -> Bench:
    """The bench for blocks of this kind; compiled if this is the first of them."""
    key = (loaded.module, tuple((matrix.name, spec) for matrix, spec in loaded.plan.grids.items()))
    if key not in job.benches:
        start = time.perf_counter()
        if job.optimize.compile == "on" and not job.benches:
            job.display.line("compiling the training step: a minute or two the first time, seconds where it is kept")
        with job.events.span("compile", block=loaded.index):
            job.benches[key] = _make_bench(job, loaded)
        if job.optimize.compile == "on":
            job.display.line(f"compiled the training step in {time.perf_counter() - start:.1f} s")
    return job.benches[key]


def _make_bench(job: BlockJob, loaded: LoadedBlock) -> Bench:
    optimize, grids = job.optimize, loaded.plan.grids
    kernels = adascale.Kernels(*(job.compiled(kernel, True) for kernel in adascale.Kernels()))
    stored = (matrix.of(loaded.source).dtype for matrix in grids)
    share = job.engine.share(next(stored, optimize.dtype))
    quantizer = BlockQuantizer(loaded.module, grids, job.method, kernels, optimize.dtype, share)
    rounds = job.encodings.in_training
    inputs = RoundedInputs(loaded.module, grids if rounds else (), job.encodings)
    loss = job.compiled(apart(block_loss), False) if rounds else job.block_loss
    bench = Bench(quantizer, None, loss, inputs)
    if not job.trains(loaded.plan):
        return bench
    bench = replace(bench, stepper=job.engine.stepper(quantizer, optimize))
    _rehearse(job, bench, loaded)
    return bench


def _rehearse(job: BlockJob, bench: Bench, loaded: LoadedBlock) -> None:
    """Take one training step and discard its result: the step is compiled, and its compilation timed, here."""
    samples = list(job.activations.samples[: job.samples_at_once])
    entering = job.activations.entering("fp", loaded.index, samples)
    loss = loss_of(job, bench, loaded, job.optimize.loss)
    bench.quantizer.start(loaded.source, None, bench.stepper.gathered)
    bench.stepper.start(1)
    with bench.inputs.active({}):
        for _ in distill(lambda inputs, targets: loss(inputs, targets)[0], bench.quantizer, bench.stepper,
                         [(entering, hidden_of(entering))], len(samples)):  # fmt: skip
            pass
    bench.stepper.rest()


def served_forward(job: BlockJob, loaded: LoadedBlock) -> Forward:
    """Function from what enters a block, as it is served, to what leaves it, hidden states in float32.

    Where the job compiles, and nothing is to be seen of the activations within, it is training's code for as many
    samples as are trained at once, which takes half of the time (measured, on a CPU). The same in a replay as in the
    block's turn, to the last bit; so no other rank is waited for.
    """
    plan, arguments = loaded.plan, loaded.plan.arguments
    if job.optimize.compile == "off" or not job.trains(plan) or plan.activations or not arguments.is_fixed:
        return loaded
    passed = (arguments.args, arguments.kwargs, loaded.dtype, job.optimize.loss)
    weights = [matrix.parameter_in(loaded.module) for matrix in plan.grids]

    def compiled(hidden_NTD: Tensor) -> Tensor:
        if len(hidden_NTD) % job.samples_at_once:
            return loaded(hidden_NTD)
        # The compiled code is reused only where inputs and targets are two tensors and the weights require gradients.
        pairs = zip(*(hidden_NTD.split(job.samples_at_once) for _ in range(2)), strict=True)
        with torch.enable_grad(), collecting(weights):
            return torch.cat([job.block_loss(loaded.module, *pair, *passed)[1].detach() for pair in pairs])

    return compiled


@contextmanager
def collecting(weights: Collection[nn.Parameter]) -> Iterator[None]:
    """Have a block's weights ask for gradients, and collect them, while the body runs."""
    for weight in weights:
        weight.requires_grad_(True)
    try:
        yield
    finally:
        for weight in weights:
            weight.requires_grad_(False)
            weight.grad = None


def block_loss(
    block: nn.Module,
    inputs_NTD: Tensor,
    targets_NTD: Tensor,
    args: tuple,
    kwargs: dict,
    dtype: torch.dtype,
    kind: Loss = "squared",
) -> tuple[Tensor, Tensor]:
    """Training loss of a block, and its output [N, T, D]: what is compiled, forward and backward, as one piece."""
    output_NTD = _trained_output(block, inputs_NTD, args, kwargs, dtype)
    return distillation_loss(output_NTD, targets_NTD, kind), output_NTD


def training_forward(loaded: LoadedBlock) -> Callable[[Tensor | Entering], Tensor]:
    """Function from what enters a block in training to the hidden states [N, T, D] that leave it, float32."""
    return lambda entering: _trained_output(loaded.module, *loaded.plan.arguments.bound(entering), loaded.dtype)


def _trained_output(block: nn.Module, inputs_NTD: Tensor, args: tuple, kwargs: dict, dtype: torch.dtype) -> Tensor:
    with sdpa_kernel(training_attention(inputs_NTD.device, inputs_NTD.shape[1], dtype)):
        return run_block(block, inputs_NTD, args, kwargs, dtype)


def loss_of(
    job: BlockJob, bench: Bench, loaded: LoadedBlock, kind: Loss
) -> Callable[[Tensor | Entering, Tensor], tuple[Tensor, Tensor]]:
    """`block_loss` of a block on its bench, by what enters it and targets [N, T, D]."""

    def loss(entering: Tensor | Entering, targets_NTD: Tensor) -> tuple[Tensor, Tensor]:
        inputs_NTD, args, kwargs = loaded.plan.arguments.bound(entering)
        return bench.loss(loaded.module, inputs_NTD, targets_NTD, args, kwargs, loaded.dtype, kind)

    return loss
