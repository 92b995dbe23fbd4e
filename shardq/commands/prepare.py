"""Decisions and checks before work starts: options, model, plan, calibration data, output folder."""

from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from shardq.calib.tokens import digest, load_tokens
from shardq.checks import check_quantize
from shardq.commands.planning import planned
from shardq.commands.redo import begin_redo, blocks_asked, mend
from shardq.compiling import why_not
from shardq.config import QuantizeConfig
from shardq.devices import multiplies_bf16
from shardq.errors import ConfigError
from shardq.export.chosen import own_form
from shardq.export.run_output import RunOutput
from shardq.files import remove_asides
from shardq.formats.shards import unread
from shardq.logs import Display
from shardq.model.hub import local_folder
from shardq.model.skeleton import Skeleton
from shardq.optimize.options import OptimizeOptions, resolved
from shardq.parallel.collectives import max_over_ranks, on_every_host, on_rank_zero, shared_by_all, together
from shardq.parallel.engines import candidates, engine_for
from shardq.parallel.ranks import Ranks
from shardq.rundir import ledger
from shardq.rundir.digests import cut_torn_line
from shardq.rundir.folder import RunFolder, output_folder
from shardq.rundir.lock import only_run
from shardq.rundir.manifest import make_manifest
from shardq.rundir.plan import Plan
from shardq.rundir.record import RunRecord, check_folder, open_run
from shardq.rundir.source import begin_with
from shardq.training.memory import (
    LargestBlock,
    choose_engine,
    choose_experts,
    choose_micro_batch,
    experts_at_once,
    largest_block,
    memory_limit,
    reads_ahead,
)
from shardq.training.streamed import of_experts

DATASET = "allenai/c4"  # of runs that are not told where to find text


@dataclass(frozen=True)
class Run:
    """A run that has passed all checks, on one rank; `begin` writes the start of it to its folder.

    Attributes:
        largest: the block that takes the most memory; None where no block is computed.
        tokens_NT: the calibration samples; none where only the weights are looked at.
        manifest: the manifest of the run.
        record: the record in its folder, with the line that begins a redo.
        begins_redo: whether that line has still to be written.
        reads_ahead: whether a block's weights are read while the block before is trained.
        experts_at_once: routed experts in memory at the same time, where they are trained by parts.
    """

    config: QuantizeConfig
    output: Path
    skeleton: Skeleton
    plan: Plan
    largest: LargestBlock | None
    tokens_NT: Tensor
    manifest: dict
    record: RunRecord
    begins_redo: bool
    reads_ahead: bool
    experts_at_once: int
    ranks: Ranks
    display: Display

    @property
    def result(self) -> RunOutput:
        """What the run writes of its model."""
        return RunOutput(self.output, self.skeleton, self.plan, own_form(self.config.export))

    @property
    def cache(self) -> Path:
        """The folder of the activations."""
        return RunFolder(self.output).cache(self.config.cache, self.record.num_redos)


def prepare(config: QuantizeConfig, ranks: Ranks, display: Display, folder_lock: ExitStack) -> Run:
    """Check everything that can be checked before work starts, and read the record in the output folder.

    Args:
        folder_lock: keeps other runs out of that folder until it is closed.
    """
    grid = together(ranks, lambda: config.quant.grid)  # first: the output folder may be named after it
    output = output_folder(config)
    former = on_rank_zero(ranks, lambda: RunRecord.read(output).options("optimize"))
    # The resolved grid: a run that was begun with another default is another run.
    quant = replace(config.quant, full_range=grid.full_range)
    is_open = config.uses_data and config.calib.dataset is None
    calib = replace(config.calib, dataset=DATASET) if is_open else config.calib
    asked = replace(config, optimize=_resolved(config, former, ranks), quant=quant, calib=calib)
    together(ranks, lambda: check_quantize(asked, ranks))
    folder = on_every_host(ranks, lambda: local_folder(asked.model, asked.revision, display.line))

    def find() -> tuple[Tensor, dict, tuple[RunRecord, dict | None], QuantizeConfig]:
        redo = None if config.redo is None else blocks_asked(config.redo, plan.num_blocks)
        for what in unread(folder):
            display.line(f"not read: {what}")
        tokens_NT, chosen = torch.empty(0, config.calib.sequence_length, dtype=torch.long), config
        if largest is not None:
            display.line(f"calibration: reading {config.calib.dataset}")
            tokens_NT = load_tokens(config.calib, folder, skeleton.embeddings.num_embeddings)
            chosen = _fitted(config, former, largest, limit, ranks, display)
        manifest = make_manifest(chosen, skeleton.source, digest(tokens_NT))
        record, line = take_folder(output, manifest, config.resume, redo, folder_lock, display)
        if line is None:
            skeleton.source.digests.update(record.source)
            mend(record, RunOutput(output, skeleton, plan, own_form(chosen.export)), display)
        return tokens_NT, manifest, (record, line), chosen

    skeleton, plan, config = together(ranks, lambda: planned(asked, folder, ranks, display))
    length = config.calib.sequence_length
    limit = -int(max_over_ranks(ranks, -memory_limit(config.optimize, ranks)))  # the least of all ranks'
    largest: LargestBlock | None = None
    if config.uses_data:
        config, largest = together(ranks, lambda: _with_experts(config, former, skeleton, plan, limit, ranks, display))
    else:
        config = _by_weights(config)
    tokens_NT, manifest, (record, redo), chosen = on_rank_zero(ranks, find)
    config = replace(chosen, cache=config.cache)  # each host decides where it keeps activations
    shared_by_all(ranks, output)
    if redo or not record.is_finished:
        begin_with(skeleton, record.source, ranks, display.line)
    ahead = largest is not None and reads_ahead(largest, config.optimize, engine_for(config.parallel, ranks), limit)
    at_once = experts_at_once(skeleton, plan, -(-len(tokens_NT) // ranks.world_size) * length, config.optimize, limit)
    if redo:
        record.lines.append(redo)
    return Run(
        config, output, skeleton, plan, largest, tokens_NT, manifest, record,
        redo is not None, ahead, at_once, ranks, display,
    )  # fmt: skip


def take_folder(
    output: Path, manifest: dict, resume: str, redo: list[int] | None, folder_lock: ExitStack, display: Display
) -> tuple[RunRecord, dict | None]:
    """Keep other runs out of a folder, and read the run in it; returns and raises as `open_run`.

    Args:
        folder_lock: keeps other runs out until it is closed.
    """
    check_folder(output, resume)
    folder_lock.enter_context(only_run(output, display.line))
    remove_asides(output)
    for log in RunFolder(output).logs:
        cut_torn_line(log)
    RunRecord.read(output).mend_manifest(manifest, display.line)
    return open_run(output, manifest, resume, redo)


def begin(run: Run) -> None:
    """Begin the run in its output folder, and take the blocks of a redo out of the record."""
    on_rank_zero(run.ranks, lambda: ledger.begin_run(run.output, run.manifest))
    if run.begins_redo:
        former = RunFolder(run.output).cache(run.config.cache, run.record.num_redos - 1)
        asked = run.config.export.asked
        begin_redo(run.output, former, run.record.lines[-1], asked, run.ranks, run.display)


def _resolved(config: QuantizeConfig, former: dict, ranks: Ranks) -> OptimizeOptions:
    """Options in which every value that does not depend on the model is filled in."""
    optimize = config.optimize
    if optimize.batch_size is None:
        # A run that goes on keeps its batches with any number of ranks: all its blocks have the same iterations.
        optimize = replace(optimize, batch_size=former.get("batch_size"))
    return resolved(optimize, config.quant.bits, ranks.world_size, multiplies_bf16(ranks.device))


def _by_weights(config: QuantizeConfig) -> QuantizeConfig:
    """Options of a run that computes no block: those that decide nothing have one value."""
    optimize = replace(config.optimize, experts="joint", micro_batch=1, compile="off")
    return replace(config, optimize=optimize, parallel=replace(config.parallel, engine="local"), self_check=False)


def _with_experts(
    config: QuantizeConfig, former: dict, skeleton: Skeleton, plan: Plan, limit: int, ranks: Ranks, display: Display
) -> tuple[QuantizeConfig, LargestBlock]:
    """Options with the way in which routed experts are trained, and the block that takes the most memory that way.

    Raises:
        ConfigError: they are to be trained by parts, which the other options do not allow.
    """
    optimize, length = config.optimize, config.calib.sequence_length
    largest = largest_block(skeleton, plan, length, optimize)
    if not any(of_experts(block) for block in skeleton.blocks):
        return replace(config, optimize=replace(optimize, experts="joint")), largest
    if optimize.experts == "auto":  # a run that goes on keeps its own way, even if memory has changed
        optimize = replace(optimize, experts=former.get("experts", "auto"))
    chosen, why = choose_experts(largest, optimize, candidates(config.parallel, ranks), limit)
    display.line(f"optimize.experts: {chosen} ({why})")
    optimize = replace(optimize, experts=chosen)
    if chosen == "joint":
        return replace(config, optimize=optimize), largest
    if config.activations.asked:
        raise ConfigError("optimize.experts: by parts, activations get no grids; leave out activations, or use joint")
    if config.parallel.engine.startswith("zero"):
        raise ConfigError(f"parallel.engine: {config.parallel.engine} does not train experts by parts; use allreduce")
    return replace(config, optimize=optimize), largest_block(skeleton, plan, length, optimize, by_parts=True)


def _fitted(
    config: QuantizeConfig,
    former: dict,
    largest: LargestBlock,
    limit: int,
    ranks: Ranks,
    display: Display,
) -> QuantizeConfig:
    """Options with engine, micro-batch and whether to compile decided for this model and machine."""
    optimize = config.optimize
    engine, reason = choose_engine(largest, optimize, candidates(config.parallel, ranks), limit)
    if engine.options != config.parallel:
        display.line(f"parallel.engine: {engine.options.engine} ({reason})")
    if optimize.micro_batch is None:
        # A run that goes on keeps its micro-batch even if memory has changed: another would round differently.
        micro_batch = former.get("micro_batch")
        if micro_batch is None or former.get("batch_size") != optimize.batch_size:  # the latter: a redo's own
            micro_batch = choose_micro_batch(largest, optimize, engine, limit)
        optimize = replace(optimize, micro_batch=micro_batch)
    if optimize.compile == "off" or config.quant.method == "rtn":
        return replace(config, parallel=engine.options, optimize=replace(optimize, compile="off"))
    missing = why_not(ranks.device)
    if missing and optimize.compile == "on":
        raise ConfigError(f"optimize.compile: on is asked for, but there is {missing}; use auto or off")
    optimize = replace(optimize, compile="off" if missing else "on")
    return replace(config, parallel=engine.options, optimize=optimize)
