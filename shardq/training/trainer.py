"""The trainer of all blocks of a kind, built for the first of them, and the job that all blocks of a run share."""

import time
from collections.abc import Callable, Collection, Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn.attention import sdpa_kernel

from shardq.calib.partition import largest_part
from shardq.compiling import Compile, is_long, uncompiled_copy
from shardq.devices import training_attention
from shardq.logs import Display, Events
from shardq.model.arguments import Call, Entering, hidden_of
from shardq.model.block import BlockPlan, LoadedBlock, run_block
from shardq.model.experts import routed_in
from shardq.model.hidden import Lanes
from shardq.model.skeleton import Skeleton
from shardq.optimize.block_quantizer import BlockQuantizer, whole
from shardq.optimize.distill import distill
from shardq.optimize.loss import Loss, distillation_loss
from shardq.optimize.options import OptimizeOptions
from shardq.optimize.rounded_inputs import RoundedInputs
from shardq.optimize.stepper import Stepper
from shardq.parallel.engine import Engine
from shardq.parallel.ranks import Ranks
from shardq.quant import adascale
from shardq.quant.options import ActivationOptions
from shardq.quant.quantized import QuantizedLinear
from shardq.rundir.block_output import rounding_to
from shardq.training.checkpoint import Checkpoints
from shardq.training.passes import Activations, Forward

Linears = dict[str, QuantizedLinear]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a run's blocks are quantized: its options, resolved.

    Attributes:
        method: `rtn`, or the method of training.
        activations: options of the activations' grids.
        written_dtype: dtype of the quantized weights in the output.
    """

    seed: int
    method: str
    optimize: OptimizeOptions
    activations: ActivationOptions
    written_dtype: torch.dtype

    def trains(self, plan: BlockPlan) -> bool:
        """Whether there is anything to train in a block."""
        return self.method != "rtn" and bool(plan.grids)


@dataclass(kw_only=True)
class Job:
    """The context of quantizing a block, the same for all blocks of a run.

    Attributes:
        tokens_NT: the calibration samples of all ranks.
        checkpoints: the checkpoints of the training, and the engine that shares it among ranks.
        compiled: compiles a function, or leaves it as it is.
        trainers: trainers built so far, by the module that blocks share and the grids of its matrices.
    """

    recipe: Recipe
    skeleton: Skeleton
    tokens_NT: Tensor
    activations: Activations
    checkpoints: Checkpoints
    events: Events
    display: Display
    compiled: Compile
    trainers: dict[tuple, "BlockTrainer"] = field(init=False, default_factory=dict)

    @property
    def engine(self) -> Engine:
        """How ranks share the training of a block."""
        return self.checkpoints.engine

    @property
    def ranks(self) -> Ranks:
        """This rank among all that work on the run."""
        return self.engine.ranks

    @property
    def num_samples(self) -> int:
        """Calibration samples over all ranks."""
        return len(self.tokens_NT)

    @property
    def samples_at_once(self) -> int:
        """Samples that go through a block at once in training."""
        optimize = self.recipe.optimize
        return min(optimize.micro_batch, largest_part(optimize.batch_size, self.ranks.world_size))

    @cached_property
    def block_loss(self) -> Callable[..., tuple[Tensor, Tensor]]:
        """`block_loss`, compiled where this job compiles."""
        return self.compiled(block_loss, False)

    def compiles(self, loaded: LoadedBlock) -> bool:
        """Whether a block's training is compiled."""
        return self.recipe.optimize.compile == "on" and not self.why_uncompiled(loaded)

    def why_uncompiled(self, loaded: LoadedBlock) -> str:
        """Why a block's training cannot well be compiled; "" if it can."""
        if routed_in(loaded.module):
            return "the sizes within it depend on which experts tokens are routed to"
        block, shape = self.skeleton.blocks[loaded.index], (1, self.tokens_NT.shape[1], loaded.plan.arguments.width)
        is_loop = is_long(lambda: run_block(block, loaded.plan.arguments.on_meta(shape), torch.float32))
        return "it computes token by token" if is_loop else ""


@dataclass(frozen=True, kw_only=True)
class BlockTrainer:
    """Trains all blocks of a kind: built for the first of them, then started with each block's weights.

    Attributes:
        stepper: None where nothing is trained.
        inputs: rounds the matrices' inputs, where that is part of training.
        block_loss: the function of that name, compiled for these blocks.
        written_dtype: dtype of the quantized weights in the output.
    """

    quantizer: BlockQuantizer
    stepper: Stepper | None
    inputs: RoundedInputs
    block_loss: Callable[..., tuple[Tensor, Tensor]]
    written_dtype: torch.dtype

    def start(
        self, source: dict[str, Tensor], power: dict[str, Tensor] | None = None, fixed: Container[str] = ()
    ) -> None:
        """Begin with a block's stored weights, rounded to nearest.

        Args:
            power: mean square of each input channel, by matrix, where the start range is searched for.
            fixed: names of matrices that are not trained.
        """
        self.quantizer.start(source, power, self._gathered, fixed)

    def restart(self) -> None:
        """Go back to the start for the same block."""
        self.quantizer.restart(self._gathered)

    def folded(self) -> Linears:
        """The quantized linears that the quantizers represent now.

        Raises:
            QuantizationError: a parameter or a scale is not finite; the same on all ranks.
        """
        return self.quantizer.folded(self._gathered)

    def serve(self, linears: Linears) -> None:
        """Have the block compute with quantized linears as they are written."""
        self.quantizer.serve(linears, rounding_to(self.written_dtype))

    def served(self) -> Linears:
        """Fold the linears and serve them: the block computes with them from here on; raises as `folded`."""
        linears = self.folded()
        self.serve(linears)
        return linears

    def loss_of(self, loaded: LoadedBlock, kind: Loss) -> Callable[[Tensor | Entering, Tensor], tuple[Tensor, Tensor]]:
        """Function from a block's input and targets [N, T, D] to its training loss and its output [N, T, D]."""

        def loss(entering: Tensor | Entering, targets_NTD: Tensor) -> tuple[Tensor, Tensor]:
            arguments = loaded.plan.arguments
            hidden, args, kwargs = arguments.bound(entering)
            return self.block_loss(
                loaded.module, hidden, targets_NTD, args, kwargs, loaded.dtype, kind, arguments.lanes
            )

        return loss

    @property
    def _gathered(self) -> Callable:
        return self.stepper.gathered if self.stepper else whole


def trainer_for(job: Job, loaded: LoadedBlock) -> BlockTrainer:
    """The trainer for a block's kind; built and compiled if the block is the first of its kind."""
    key = (loaded.module, tuple((matrix.name, grid) for matrix, grid in loaded.plan.grids.items()))
    if key not in job.trainers:
        begun, compiles = time.perf_counter(), job.recipe.optimize.compile == "on"
        if compiles and not job.trainers:
            job.display.line("compiling the training step: a minute or two the first time, seconds where it is kept")
        with job.events.span("compile", block=loaded.index):
            job.trainers[key] = _make_trainer(job, loaded)
        if compiles and (reason := job.why_uncompiled(loaded)):
            job.display.line(f"{loaded.plan.name} and its like train uncompiled: {reason}")
        elif compiles:
            job.display.line(f"compiled the training step in {time.perf_counter() - begun:.1f} s")
    return job.trainers[key]


def _make_trainer(job: Job, loaded: LoadedBlock) -> BlockTrainer:
    recipe, optimize, grids = job.recipe, job.recipe.optimize, loaded.plan.grids
    kernels = adascale.Kernels(*(job.compiled(kernel, True) for kernel in adascale.Kernels()))
    dtypes = (loaded.source[matrix.tensor].dtype for matrix in grids)
    share = job.engine.share(next(dtypes, optimize.dtype))
    quantizer = BlockQuantizer(loaded.module, grids, recipe.method, kernels, optimize.dtype, share)
    rounds = recipe.activations.in_training
    of_block = job.compiled(uncompiled_copy(block_loss), False) if rounds else job.block_loss
    trainer = BlockTrainer(
        quantizer=quantizer,
        stepper=job.engine.stepper(quantizer, optimize) if recipe.trains(loaded.plan) else None,
        inputs=RoundedInputs(loaded.module, grids if rounds else (), recipe.activations),
        block_loss=of_block if job.compiles(loaded) else block_loss,
        written_dtype=recipe.written_dtype,
    )
    if trainer.stepper is not None:
        _warm_up(job, trainer, loaded)
    return trainer


def _warm_up(job: Job, trainer: BlockTrainer, loaded: LoadedBlock) -> None:
    """Take one training step and discard its result: the step is compiled, and its compilation timed, here."""
    samples = list(job.activations.samples[: job.samples_at_once])
    entering = job.activations.entering("fp", loaded.index, samples)
    loss = trainer.loss_of(loaded, job.recipe.optimize.loss)
    trainer.start(loaded.source)
    trainer.stepper.start(1)
    with trainer.inputs.active({}):
        for _ in distill(lambda inputs, targets: loss(inputs, targets)[0], trainer.quantizer, trainer.stepper,
                         [(entering, hidden_of(entering))], len(samples)):  # fmt: skip
            pass
    trainer.stepper.release()


def served_forward(job: Job, loaded: LoadedBlock) -> Forward:
    """Function from a served block's input to its output, hidden states in float32.

    If the job compiles and no activation within the block is observed, it uses the compiled training code, for as many
    samples as are trained at once, which halves the time (measured, on a CPU). A replay gives the same bits as the
    block's own turn; no other rank is waited for.
    """
    plan, arguments, optimize = loaded.plan, loaded.plan.arguments, job.recipe.optimize
    if not (job.compiles(loaded) and job.recipe.trains(plan) and arguments.is_fixed) or plan.activations:
        return loaded
    passed = (arguments.args, arguments.kwargs, loaded.dtype, optimize.loss)
    weights = [matrix.weight_in(loaded.module) for matrix in plan.grids]

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
    """In the body, have a block's weights require gradients and collect them."""
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
    hidden: Tensor,
    targets_NTD: Tensor,
    args: tuple,
    kwargs: dict,
    dtype: torch.dtype,
    kind: Loss = "squared",
    lanes: Lanes | None = None,
) -> tuple[Tensor, Tensor]:
    """Training loss of a block, and its output [N, T, D]; compiled, forward and backward, as one piece."""
    output_NTD = training_output(block, Call(hidden, args, kwargs), dtype, lanes)
    return distillation_loss(output_NTD, targets_NTD, kind), output_NTD


def training_output(block: nn.Module, call: Call, dtype: torch.dtype, lanes: Lanes | None) -> Tensor:
    """A block's output [N, T, D], by the attention kernel whose backward pass is the fastest for these inputs."""
    length = call.hidden.shape[lanes.dim + 1 if lanes else 1]
    with sdpa_kernel(training_attention(call.hidden.device, length, dtype)):
        output = run_block(block, call, dtype)
    return lanes.flat(output) if lanes else output
