"""What a run says of its blocks, and at its end."""

from shardq.commands.prepare import Run
from shardq.rundir.folder import RunFolder
from shardq.training.objective import LOSSES


def not_finite(entry: dict) -> str:
    """What became of a block that met numbers which are not finite."""
    then = "left at its best finite iterate" if entry["gave_up"] else "then trained at lower rates"
    return f"numbers were not finite in {entry['failed_tries']} training(s), {then}"


def say_what_is_where(run: Run, summary: dict, blocks: list[dict]) -> None:
    """Say what came of a finished run, what its files are, and what to do next."""
    display, output = run.display, run.output
    losses = [
        said.format(summary[f"{kind}_before"], summary[f"{kind}_after"])
        for kind, said in LOSSES.items()
        if summary[f"{kind}_before"] is not None
    ]
    cost = f"{summary['seconds']:.0f} s, peak {summary['peak_rss_bytes'] / 2**20:.0f} MiB a rank"
    display.line(f"done: mean {', '.join(losses)}, {cost}")
    for block, entry in zip(run.plan.blocks, blocks, strict=True):
        if entry.get("failed_tries"):
            display.line(f"  {block.name}: {not_finite(entry)}")
    display.line(f"  {output}/  loads with transformers: AutoModelForCausalLM.from_pretrained({str(output)!r})")
    display.line(f"  {output}/blocks/  codes, scales and zero points of each block")
    for version in run.plan.encoding_versions:
        display.line(f"  {RunFolder(output).encodings(version)}  AIMET encodings {version} (per block in encodings/)")
    for chosen in run.config.export.asked:
        display.line(f"  {output}/{chosen}/  the same model as {chosen}")
    display.line(f"next: launch/evaluate.py --model {output} --eval.dataset FILE  measures its perplexity")
