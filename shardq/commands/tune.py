"""Tuning the scales of a finished run end to end, into a new run with the same codes and other scales."""

import shutil
import time
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from shardq.cache.store import open_store
from shardq.calib.options import TextOptions
from shardq.calib.partition import owned_samples, step_samples
from shardq.calib.tokens import digest, load_tokens
from shardq.checks import check_tune
from shardq.commands.prepare import take_folder
from shardq.commands.redo import mend
from shardq.commands.space import check_space_for_tuning
from shardq.config import TuneConfig
from shardq.devices import multiplies_bf16
from shardq.errors import CalibrationError, CheckpointError, ConfigError, ResumeError
from shardq.export.chosen import own_form
from shardq.export.run_output import RunOutput
from shardq.export.target import as_served
from shardq.files import remove, sha256_of
from shardq.formats.block_file import read_scale_shapes
from shardq.formats.checkpoint import companions
from shardq.formats.source import Digests
from shardq.formats.tensor_file import read_checked, write_checked
from shardq.logs import Display, Events, peak_rss_bytes
from shardq.model.hub import local_folder
from shardq.model.skeleton import Skeleton, open_skeleton
from shardq.optimize.options import TuneOptions, resolved_tuning
from shardq.optimize.scale_tuner import ScaleTuner
from shardq.parallel.collectives import barrier, max_over_ranks, on_every_host, on_rank_zero, shared_by_all, together
from shardq.parallel.ranks import Ranks
from shardq.rundir import ledger
from shardq.rundir.folder import RunFolder
from shardq.rundir.manifest import differences, export_options, model_of, quant_options
from shardq.rundir.plan import Plan, make_plan
from shardq.rundir.record import RunRecord
from shardq.rundir.source import agree, all_stored, begin_with, noted
from shardq.rundir.stop import stop_if_asked, stoppable
from shardq.summaries import TuneSummary
from shardq.training.activation_grids import written_grids
from shardq.training.passes import Activations
from shardq.training.scale_tuning import Tuning, embed_and_target, tunable, tune_step
from shardq.training.self_check import say_if_unchecked

STEPS_A_STATE = 4  # steps between two saved states; a state is as large as the scales, a step goes through all blocks


class Found(NamedTuple):
    """The run that is tuned, and the progress in the output folder.

    Attributes:
        manifest, record: manifest and record of the output folder.
        digests: digests of the model's stored tensors, as the run has read them.
    """

    manifest: dict
    options: TuneOptions
    tokens_NT: Tensor
    record: RunRecord
    digests: Digests


def tune(config: TuneConfig, ranks: Ranks) -> TuneSummary:
    """Tune a finished run's scales, or go on where an interrupted tuning stopped.

    Raises:
        ShardQError: any of its kinds; the same on every rank where the cause is common.
    """
    start, display, output = time.perf_counter(), Display(ranks.rank), config.folder
    together(ranks, lambda: check_tune(config))
    say_if_unchecked(config.self_check, display)
    folder = on_every_host(ranks, lambda: local_folder(config.model, config.revision, display.line))
    skeleton = together(ranks, lambda: open_skeleton(folder))
    with ExitStack() as folder_lock:
        found = on_rank_zero(ranks, lambda: _find(config, skeleton, ranks, display, folder_lock))
        shared_by_all(ranks, output)
        plan = together(ranks, lambda: _plan(skeleton, found.manifest))
        losses = []
        if found.record.is_finished:
            # Left by a kill right after the last ledger line.
            on_rank_zero(ranks, lambda: remove(RunFolder(output).tuning_state))
            display.line(f"{output}: this tuning is finished, nothing is left to do; shardq verify {output} reads all")
        else:
            plan = together(ranks, lambda: tunable(skeleton, plan, found.tokens_NT.shape[1], ranks.device))
            check_space_for_tuning(config, skeleton, plan, found.manifest, found.record, ranks, found.tokens_NT.shape)
            begin_with(skeleton, found.digests, ranks, display.line)
            on_rank_zero(ranks, lambda: ledger.begin_run(output, found.manifest))
            losses = _finish(config, skeleton, plan, found, ranks, display)
    summary: TuneSummary = {
        "output": str(output),
        "steps": found.options.steps,
        "seconds": round(time.perf_counter() - start, 3),
        "peak_rss_bytes": int(max_over_ranks(ranks, peak_rss_bytes())),
        "loss_first": losses[0] if losses else None,
        "loss_last": losses[-1] if losses else None,
    }
    display.line(f"done: {summary['seconds']:.0f} s, peak {summary['peak_rss_bytes'] / 2**20:.0f} MiB a rank")
    display.line(f"  {output}/  a run like the one that it came from: evaluate, export and verify take it")
    return summary


def _find(config: TuneConfig, skeleton: Skeleton, ranks: Ranks, display: Display, folder_lock: ExitStack) -> Found:
    """Check the run, the model and the output folder.

    Args:
        folder_lock: keeps other runs out of that folder until it is closed.
    """
    run, output = Path(config.run), config.folder
    companions(skeleton.folder)  # refuses a file that must not be copied before any work
    quantized = RunRecord.read(run)
    quantized.check_finished()
    former = quantized.manifest()
    others = differences({"model": former["model"]}, {"model": model_of(skeleton.source)})
    if others:
        raise ConfigError(
            f"model: {config.model} is not the model that {run} has quantized; "
            f"different: {'; '.join(others.values())}; give that one"
        )
    display.line("calibration: reading the run's text again")
    tokens_NT = _tokens(config, former, skeleton)
    if len(tokens_NT) < ranks.world_size:
        raise ConfigError(f"{run}: its {len(tokens_NT)} samples are fewer than {ranks.world_size} ranks; take fewer")
    options = resolved_tuning(config.tune, len(tokens_NT), multiplies_bf16(ranks.device))
    if options.batch_size > len(tokens_NT):
        most = f"at most the run's {len(tokens_NT)} samples"
        raise ConfigError(f"tune.batch_size: {options.batch_size} is not allowed, it must be {most}")
    manifest = former | {"tuned": {"run": sha256_of(RunFolder(run).ledger), "options": asdict(options)}}
    record, _ = take_folder(output, manifest, "auto", None, folder_lock, display)
    skeleton.source.digests.update(quantized.source)
    plan = _plan(skeleton, manifest)
    mend(record, RunOutput(output, skeleton, plan, own_form(export_options(manifest))), display)
    return Found(manifest, options, tokens_NT, record, quantized.source)


def _tokens(config: TuneConfig, former: dict, skeleton: Skeleton) -> Tensor:
    """The token ids [N, T] that the run, of the manifest `former`, was calibrated on, from where its text is now."""
    text = config.calib.instead_of(TextOptions(**former["options"]["calib"]))
    if text.dataset is None:
        raise ConfigError(f"{config.run}: quantized by its weights alone, without data that it could be tuned on; "
                          "quantize with --calib.dataset")  # fmt: skip
    advice = "or say with --calib.dataset where that text is now"
    try:
        tokens_NT = load_tokens(text, skeleton.folder, skeleton.embeddings.num_embeddings)
    except CalibrationError as error:
        raise CalibrationError(f"{error}; {config.run} was calibrated on it: restore it, {advice}") from error
    if digest(tokens_NT) != former["calibration_tokens"]:
        raise ConfigError(
            f"{text.dataset}: gives other tokens than those that {config.run} was calibrated on; "
            f"restore that text, {advice}"
        )
    return tokens_NT


def _finish(
    config: TuneConfig, skeleton: Skeleton, plan: Plan, found: Found, ranks: Ranks, display: Display
) -> list[float]:
    """Take the remaining steps and write the run; return the steps' losses."""
    events = Events(RunFolder(config.folder).log(ranks), ranks.rank)
    tuners = together(ranks, lambda: _tuners(Path(config.run), plan, found.options))
    state = RunFolder(config.folder).tuning_state
    done = together(ranks, lambda: _restore(state, tuners))
    if found.record.entries and done < found.options.steps:
        raise ResumeError(f"{config.folder}: {state.name}, from which its blocks were made, is gone; delete the folder")
    cache = RunFolder(config.folder).cache(config.cache)
    shutil.rmtree(cache, ignore_errors=True)  # on every rank: each host may have its own cache
    barrier(ranks)
    num_samples, length = found.tokens_NT.shape
    samples = owned_samples(num_samples, ranks.rank, ranks.world_size)
    store = open_store(config.cache, cache, ranks.device)
    activations = Activations(store, samples, length, ranks.device, events.waiting, ranks.pace, plan.blocks)
    steps_left = done < found.options.steps
    if steps_left:
        display.line(f"the float model's predictions come first, through {plan.num_blocks} blocks")
        with events.span("prepare activations"):
            target = partial(embed_and_target, skeleton, found.tokens_NT, activations, ranks,
                             found.options.dtype, config.self_check)  # fmt: skip
            together(ranks, target)
            agree(skeleton.source.digests, all_stored(skeleton), ranks)
    tuning = Tuning(
        run=Path(config.run),
        skeleton=skeleton,
        plan=plan,
        options=found.options,
        tokens_NT=found.tokens_NT,
        tuners=tuners,
        activations=activations,
        ranks=ranks,
        events=events,
        display=display,
    )
    losses = _take_steps(tuning, config.folder, done) if steps_left else []
    shutil.rmtree(cache, ignore_errors=True)
    with events.span("write"):
        on_rank_zero(ranks, lambda: _write(config.folder, tuning, found))
    return losses


def _tuners(run: Path, plan: Plan, options: TuneOptions) -> list[ScaleTuner]:
    """A tuner for each block, at its start."""
    tuners = []
    for block in plan.blocks:
        of_linears = read_scale_shapes(RunFolder(run).block(block.index))
        shapes = {matrix.name: of_linears[block.full_name(matrix)] for matrix in block.grids}
        tuners.append(ScaleTuner(shapes, options.learning_rate))
    return tuners


def _take_steps(tuning: Tuning, output: Path, done: int) -> list[float]:
    """Take the steps after the first `done`, save the state at intervals and at the end, and return their losses."""
    options, ranks, display, losses = tuning.options, tuning.ranks, tuning.display, []
    steps = step_samples(len(tuning.tokens_NT), options.batch_size, options.steps, ranks.rank, ranks.world_size)
    with display.bars(options.steps, done, "steps", "blocks"), stoppable(output, ranks):
        for step, samples in islice(steps, done, None):
            start = time.perf_counter()
            display.start_block(f"step {step + 1}")
            display.start_training(0, 2 * tuning.plan.num_blocks - 1)
            losses.append(tune_step(tuning, step, samples))
            display.advance_block()
            seconds = time.perf_counter() - start
            display.line(f"step {step + 1}/{options.steps}: loss {losses[-1]:.4f} nats a token, {seconds:.1f} s")
            if (step + 1) % STEPS_A_STATE == 0 or step + 1 == options.steps:
                on_rank_zero(ranks, partial(_save, RunFolder(output).tuning_state, tuning.tuners, step + 1))
                stop_if_asked(output, ranks, step + 1, options.steps, "step")
    return losses


def _save(path: Path, tuners: list[ScaleTuner], done: int) -> None:
    """Write the state, which is equal on all ranks, to a file that appears whole."""
    state = {f"{number}.{name}": value for number, tuner in enumerate(tuners) for name, value in tuner.state().items()}
    write_checked(path, state, {"done": done})


def _restore(path: Path, tuners: list[ScaleTuner]) -> int:
    """Load the state that `_save` wrote, if there is one; return the number of steps done.

    Raises:
        CheckpointError: the file is damaged.
    """
    if not path.exists():
        return 0
    try:
        state, about = read_checked(path)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; delete it to begin at the first step") from error
    for number, tuner in enumerate(tuners):
        prefix = f"{number}."
        tuner.restore({name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)})
    return about["done"]


def _plan(skeleton: Skeleton, manifest: dict) -> Plan:
    """The plan of the run that a manifest is of."""
    plan, target = make_plan(skeleton, quant_options(manifest["options"]["quant"])), manifest["options"].get("target")
    return as_served(target, export_options(manifest), skeleton, plan)


def _write(output: Path, tuning: Tuning, found: Found) -> None:
    """Write the missing blocks, and the files that complete the run."""
    skeleton, plan = tuning.skeleton, tuning.plan
    result = RunOutput(output, skeleton, plan, own_form(export_options(found.manifest)))
    for block in plan.blocks:
        if block.index not in found.record.entries:
            grids, linears = written_grids(tuning.run, block), tuning.linears(block)
            files = result.write_block(block, linears, grids, tuning.ranks.device, {})
            source = noted(found.digests, skeleton, block.index)
            ledger.commit(output, block.index, files, world_size=tuning.ranks.world_size, source=source)
    ledger.complete(output, result.write_end(RunRecord.read(output)))
    remove(RunFolder(output).tuning_state)
