"""Training of a block by parts: first all but its routed experts, then these, a few at a time.

The first part is trained with the experts' outputs as the float model has them. Each expert is then trained on the
tokens that the quantized stream's router gives it, towards what it makes of the same tokens in the float model. So
memory holds the first part, or a few experts.
"""

import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from shardq.calib.partition import watched_samples
from shardq.formats.block_file import LinearsInFiles, write_block
from shardq.matrix import Matrix
from shardq.model.block import LoadedBlock
from shardq.model.experts import answered
from shardq.optimize.channel_power import channel_power
from shardq.parallel.collectives import on_rank_zero, reduce_over_ranks, together
from shardq.quant.quantized import QuantizedLinear
from shardq.rundir.block_output import rounding_to
from shardq.training.block import Seen, in_training, start_at_nearest
from shardq.training.expert_training import ExpertTrainer, expert_trainer, tokens_of, train_expert
from shardq.training.routing import power_of_all_tokens, sampling, watched
from shardq.training.self_check import Check, checked_samples
from shardq.training.streamed import (
    AT_START,
    OUTPUT,
    Read,
    StreamedBlock,
    add_outputs,
    experts_name,
    finish,
    in_memory,
    route,
    taking_outputs,
)
from shardq.training.trainer import Job, Linears
from shardq.training.tries import BlockInTraining, BlockResult, agreed_loss, train


@dataclass(frozen=True, kw_only=True)
class Parts:
    """How a run's blocks are trained by parts.

    Attributes:
        at_once: experts that are in memory at the same time.
        read: reads experts' tensors.
        folder: a folder for trained experts until their block is written; what is there goes.
    """

    at_once: int
    read: Read
    folder: Path


def quantize_by_parts(job: Job, loaded: LoadedBlock, parts: Parts, check: Check) -> BlockResult:
    """Quantize a block whose routed experts are not in memory, and move both streams on.

    Args:
        check: compares the block's output with the model's own.
    """
    plan, name = loaded.plan, experts_name(loaded.module)
    block = StreamedBlock(loaded=loaded, activations=job.activations, name=name, at_once=parts.at_once, read=parts.read)
    seen = _float_pass(job, block, check)
    with taking_outputs(block) as whole:
        first = replace(job, activations=whole.activations)
        first.trainers = job.trainers
        grids = {matrix: grid for matrix, grid in plan.grids.items() if matrix not in _matrices(block, plan.grids)}
        rest = replace(whole.loaded, plan=replace(whole.loaded.plan, grids=grids))
        with in_training(first, rest, {}) as training:
            result = train(training, start_at_nearest(training, replace(seen, starved={})))
            result = _with_experts(job, block, training, result, seen, parts.folder)
    if not plan.is_last:
        with job.events.span("quant pass", block=block.index):
            finish(block, "quant")
    block.drop()
    return result


def again_by_parts(
    job: Job, loaded: LoadedBlock, parts: Parts, read_written: Read, put_written: Callable[[], None]
) -> None:
    """Take both streams through a finished block whose routed experts are not in memory; no other rank is waited for.

    Args:
        read_written: as `parts.read`, but of the quantized block.
        put_written: puts the other quantized weights into the block.
    """
    name = experts_name(loaded.module)
    block = StreamedBlock(loaded=loaded, activations=job.activations, name=name, at_once=parts.at_once, read=parts.read)
    for stream, read in (("fp", parts.read), ("quant", read_written)):
        if stream == "quant":
            put_written()
        block = replace(block, read=read)
        route(block, stream)
        for some in block.groups:
            with in_memory(block, some):
                add_outputs(block, some, stream, OUTPUT, job.activations.samples)
        finish(block, stream)
    block.drop()


def _float_pass(job: Job, block: StreamedBlock, check: Check) -> Seen:
    """Move the fp stream on through a block, and keep its experts' outputs."""
    loaded, optimize, samples = block.loaded, job.recipe.optimize, job.activations.samples
    searched = loaded.plan.grids if optimize.start == "search" else {}
    rest = [matrix for matrix in searched if matrix not in _matrices(block, searched)]
    stride = sampling(job.num_samples, job.activations.sequence_length)
    with job.events.span("fp pass", block=block.index) as facts:
        with channel_power(loaded.module, rest) as power, watched(loaded.module, stride) as routing:
            route(block, "fp")
        reduce_over_ranks(job.ranks, list(routing.tokens.values()))
        starved = routing.starved(optimize.min_expert_tokens)
        for some in block.groups:
            own = _matrices(block, searched, some)
            with in_memory(block, some):
                with channel_power(loaded.module, own) as of_experts:
                    add_outputs(block, some, "fp", OUTPUT, samples)
                names = [name for number in some if (name := f"{block.name}.{number}") in starved]
                power |= of_experts | power_of_all_tokens(loaded, routing, names, own)
        reduce_over_ranks(job.ranks, list(power.values()))
        finish(block, "fp")
        facts |= routing.facts
    with job.events.span("self-check", block=block.index):
        _check(job, block, check)
    return Seen(power=power, grids={}, starved=starved)


def _check(job: Job, block: StreamedBlock, check: Check) -> None:
    """Compare the block's output with the model's own, in which the experts give what they gave in the stream."""
    samples = checked_samples(job.activations)
    output_NTD = block.activations.load(OUTPUT, block.index, samples)[:, 0]

    def answer(hidden_TD: Tensor, *others: Tensor) -> Tensor:
        return output_NTD[:, : len(hidden_TD) // len(samples)].flatten(0, 1).to(hidden_TD.dtype)

    with answered(block.experts, answer):
        together(job.ranks, lambda: check(block.loaded))


def _with_experts(
    job: Job, block: StreamedBlock, training: BlockInTraining, result: BlockResult, seen: Seen, folder: Path
) -> BlockResult:
    """The result of a block whose first part is served, with that of its experts; their outputs are kept."""
    grids, optimize, ranks = block.loaded.plan.grids, job.recipe.optimize, job.ranks
    looked_at = watched_samples(job.num_samples, optimize.held_out, ranks.rank, ranks.world_size)
    held: dict[str, QuantizedLinear | Path] = dict(result.linears)
    on_rank_zero(ranks, lambda: shutil.rmtree(folder, ignore_errors=True))
    with job.events.span("experts", block=block.index):
        route(block, "quant")
        own = expert_trainer(job, block, grids)
        for some in block.groups:
            with in_memory(block, some):
                starts, ends = _trained(own, block, some, seen)
                _serve(job, block, starts)
                add_outputs(block, some, "quant", AT_START, looked_at)
                _serve(job, block, ends)
                add_outputs(block, some, "quant", OUTPUT, job.activations.samples)
            path = folder / f"{some.start:05d}.safetensors"
            on_rank_zero(ranks, partial(write_block, path, ends))
            held |= dict.fromkeys(ends, path)
        own.quantizer.release()
    with job.events.span("loss", block=block.index):
        after = agreed_loss(training)
        ends_NTD = {sample: block.activations.store.read(OUTPUT, block.index, sample) for sample in looked_at}
        for sample in looked_at:
            block.activations.store.write(OUTPUT, block.index, sample,
                                          block.activations.store.read(AT_START, block.index, sample))  # fmt: skip
        before = agreed_loss(training)
        for sample, end_NTD in ends_NTD.items():
            block.activations.store.write(OUTPUT, block.index, sample, end_NTD)
    linears = LinearsInFiles(held, {matrix.name: matrix.name for matrix in grids})
    return replace(result, linears=linears, loss_before=before, loss_after=after, starved=seen.starved)


def _trained(own: ExpertTrainer, block: StreamedBlock, some: range, seen: Seen) -> tuple[Linears, Linears]:
    """The linears of some experts, which are in memory, at their start and trained, by name within the block."""
    starts: Linears = {}
    ends: Linears = {}
    tokens, num = tokens_of(own.job, block, some), block.experts.num_experts
    for number in some:
        own.job.display.start_part("experts", number, num)
        name, expert = f"{block.name}.{number}", block.experts.get_submodule(str(number))
        full = {f"{name}.{matrix.name}": matrix.name for matrix in own.matrices}
        power = {inner: seen.power[outer] for outer, inner in full.items() if outer in seen.power}
        start, end = train_expert(own, (block.index, name), expert, tokens.pop(number), power, name in seen.starved)
        for outer, inner in full.items():
            starts[outer], ends[outer] = start[inner].to("cpu"), end[inner].to("cpu")
    return starts, ends


@torch.no_grad()
def _serve(job: Job, block: StreamedBlock, linears: Linears) -> None:
    """Have experts, which are in memory, compute with quantized linears as they are written."""
    as_written, device = rounding_to(job.recipe.written_dtype), job.activations.device
    for name, linear in linears.items():
        block.loaded.module.get_submodule(name).weight.copy_(as_written(linear.to(device).dequantized()))


def _matrices(block: StreamedBlock, matrices: Iterable[Matrix], some: range | None = None) -> list[Matrix]:
    """Those matrices that are of experts: of some (default: of any)."""
    numbers = range(block.experts.num_experts) if some is None else some
    prefixes = tuple(f"{block.name}.{number}." for number in numbers)
    return [matrix for matrix in matrices if matrix.name.startswith(prefixes)]
