"""Output about a run: what it will do, a line when a block is done, the summary, and the lines at the end."""

from shardq.commands.prepare import Run
from shardq.compiling import why_not
from shardq.export.form import why_not_in_vllm
from shardq.formats import encodings
from shardq.logs import peak_device_bytes, peak_rss_bytes
from shardq.model.block import BlockPlan
from shardq.model.build import factory_of
from shardq.model.choice import shared_linears
from shardq.parallel.collectives import max_over_ranks
from shardq.rundir.account import Account, account_of
from shardq.rundir.folder import RunFolder
from shardq.rundir.plan import ENCODINGS
from shardq.summaries import QuantizeSummary
from shardq.training.objective import LOSSES, PREDICTION_STEPS
from shardq.training.self_check import say_if_unchecked
from shardq.training.tries import BlockResult

NAMED_EXPERTS = 4  # in a line; the ledger has all


def say_what_will_be_done(run: Run) -> None:
    """Print what a run is about to do, and how."""
    config, line = run.config, run.display.line
    line(
        f"{config.model}: {run.plan.num_blocks} blocks, {run.plan.num_matrices} linears to quantize "
        f"({config.quant.method}, {config.quant.bits} bits) on {run.ranks.world_size} rank(s), {run.ranks.device.type}"
    )
    if run.skeleton.source.scheme:
        line(f"source: weights stored as {run.skeleton.source.scheme} are decoded as they are read")
    if not config.uses_data:
        line("no calibration data: every matrix goes to its nearest codes, by its weights alone")
    if shared := shared_linears(run.skeleton):
        line(f"{len(shared)} linear(s) stay in float, because several blocks share their weights: {', '.join(shared)}")
    if config.quant.grid.has_signed_scales and run.plan.has_encodings:
        line(
            "grid: scales may be negative, and AIMET's encodings are of asymmetric grids; "
            "--quant.full_range false for runtimes that ask for symmetric weights"
        )
    for version in ENCODINGS if run.plan.has_encodings else ():
        if version not in run.plan.encoding_versions:
            line(f"no AIMET encodings of version {version}: {encodings.size_of(version, run.plan.num_scales)}")
    if config.uses_data:
        _say_how_data_are_used(run)
    if run.record.is_finished:
        line(f"{run.output}: this run is finished, nothing is left to do; shardq verify {run.output} reads every byte")


def _say_how_data_are_used(run: Run) -> None:
    config, optimize, line = run.config, run.config.optimize, run.display.line
    more = f", the last {PREDICTION_STEPS} times as many" if optimize.last_block == "predictions" else ""
    line(
        f"calibration: {len(run.tokens_NT)} samples of {config.calib.sequence_length} tokens; {optimize.iterations} "
        f"iterations of {optimize.batch_size} sample(s) see {optimize.iterations * optimize.batch_size} samples a "
        f"block{more}"
    )
    if config.quant.method != "rtn":
        # Asked only where it is not compiled: the answer takes an import of seconds.
        missing = why_not(run.ranks.device) if optimize.compile == "off" else None
        how = "compiled" if optimize.compile == "on" else f"not compiled{f': {missing}' if missing else ''}"
        line(
            f"training: {optimize.precision} matrix multiplies, {optimize.micro_batch} sample(s) at once a rank, {how}"
        )
    if optimize.batch_size % run.ranks.world_size:
        line(
            f"{optimize.batch_size} sample(s) a step do not divide among {run.ranks.world_size} ranks: "
            "in every step some ranks wait for the others"
        )
    say_if_unchecked(config.self_check, run.display)
    if not run.reads_ahead:
        line("no block is read while the one before is trained: memory has no room for both")


def say_block_done(run: Run, block: BlockPlan, result: BlockResult, gained: int, seconds: float) -> None:
    """Print the result of a block that has just been committed.

    Args:
        gained: change in the number of finished blocks.
        seconds: duration of the block.
    """
    run.display.line(
        f"block {block.index} {block.name}, {run.record.num_done} of {run.plan.num_blocks} done: "
        f"{LOSSES[result.kind].format(result.loss_before, result.loss_after)}, "
        f"{seconds:.1f} s, peak {peak_device_bytes(run.ranks.device) / 2**20:.0f} MiB"
        + "".join(f"; {words}" for words in _said_of(run, result.facts))
    )
    run.display.advance_block(gained)
    if gained <= 0:
        run.display.line(f"block {block.index} has come out otherwise; all after it are done again")


def account_of_run(run: Run) -> Account:
    """What became of every tensor of a run's source."""
    return account_of(run.skeleton, run.plan.grids, run.config.quant.ignored)


def summary_of(run: Run, account: Account, seconds: float) -> QuantizeSummary:
    """The facts of a finished run that `quantize` returns, those of all ranks together.

    Args:
        account: of the source's tensors.
        seconds: duration of this call.
    """
    entries = list(run.record.blocks.values())
    means = {f"{kind}_{when}": _mean(entries, f"{kind}_{when}") for kind in LOSSES for when in ("before", "after")}
    return {
        "output": str(run.output),
        "blocks": len(entries),
        "seconds": round(seconds, 3),
        "peak_rss_bytes": int(max_over_ranks(run.ranks, peak_rss_bytes())),
        **means,
        **account.facts(),
    }


def say_what_is_where(run: Run, account: Account, summary: QuantizeSummary) -> None:
    """Print the result of a finished run, what became of the source's tensors, the files, and the next steps."""
    display, output = run.display, run.output
    losses = [
        said.format(summary[f"{kind}_before"], summary[f"{kind}_after"])
        for kind, said in LOSSES.items()
        if summary[f"{kind}_before"] is not None
    ]
    cost = f"{summary['seconds']:.0f} s, peak {summary['peak_rss_bytes'] / 2**20:.0f} MiB a rank"
    display.line(f"done: {', '.join([f'mean {loss}' for loss in losses[:1]] + losses[1:] + [cost])}")
    for block, entry in zip(run.plan.blocks, run.record.blocks.values(), strict=True):
        for words in _said_of(run, entry):
            display.line(f"  {block.name}: {words}")
    share, *left = account.lines()
    display.line(share)
    for line in left:
        display.line(f"  {line}")
    if run.config.export.checkpoint == "packed" and not why_not_in_vllm(run.config, run.skeleton, run.plan):
        display.line(f"  {output}/  is served as it is: vllm serve {output}")
    if run.config.export.checkpoint == "plain" or run.skeleton.joins_experts:
        factory, unpack = factory_of(run.skeleton.model), ""
        if _must_unpack(run):
            unpack = ", quantization_config=CompressedTensorsConfig(dequantize=True)"
        display.line(f"  {output}/  loads with transformers: {factory}.from_pretrained({str(output)!r}{unpack})")
    display.line(f"  {output}/blocks/  codes, scales and zero points of each block")
    for version in run.plan.encoding_versions:
        display.line(f"  {RunFolder(output).encodings(version)}  AIMET encodings {version} (per block in encodings/)")
    for chosen in run.config.export.asked:
        display.line(f"  {output}/{chosen}/  the same model as {chosen}")
    display.line(f"next: shardq evaluate {output} --eval.dataset FILE  measures its perplexity")


def _must_unpack(run: Run) -> bool:
    """Whether transformers loads the run's checkpoint only unpacked, as it is of packed zero points (5.23)."""
    return run.config.export.checkpoint == "packed" and not run.config.quant.symmetric


def _mean(entries: list[dict], key: str) -> float | None:
    """Mean of a fact over the blocks that have it; None if none has."""
    values = [entry[key] for entry in entries if key in entry]
    return sum(values) / len(values) if values else None


def _said_of(run: Run, entry: dict) -> list[str]:
    """What a user should know of a block, in words, from its facts in the ledger."""
    least = run.config.optimize.min_expert_tokens
    not_finite = [_not_finite(entry)] if entry.get("failed_tries") else []
    return not_finite + ([_starved(entry["starved_experts"], least)] if entry.get("starved_experts") else [])


def _starved(tokens: dict[str, int], least: int) -> str:
    """The experts that too few tokens reached, the first ones by name."""
    names = [f"{name} ({count})" for name, count in list(tokens.items())[:NAMED_EXPERTS]]
    more = f" and {len(tokens) - len(names)} more" if len(tokens) > len(names) else ""
    return f"{len(tokens)} expert(s) got fewer than {least} tokens and stay at the start: {', '.join(names)}{more}"


def _not_finite(entry: dict) -> str:
    """The outcome, in words, of a block whose training met numbers that are not finite."""
    then = "left at its best finite iterate" if entry["gave_up"] else "then trained at lower rates"
    return f"numbers were not finite in {entry['failed_tries']} training(s), {then}"
