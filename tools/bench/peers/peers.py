"""Compare shardq with AIMET's AdaScale, AutoRound and llm-compressor's GPTQ: step and wall times, memory, perplexity.

    python tools/bench/peers/peers.py --model DIR --ids FILE --iterations N \\
        --aimet PYTHON --autoround PYTHON --llmcompressor PYTHON

All quantize the same decoder linears (4 bits, symmetric, per-channel) from the same token ids, with the same number of
iterations of one sample a block (GPTQ takes none), one after the other, each as a process in its own environment. An
environment needs `aimet-torch`, `auto-round` or `llmcompressor` with their transformers. FILE holds int tensors
`calib_ids` and `eval_ids` [sequences, length]. `--blocks K` quantizes the first K decoder blocks only, where steps cost
what they cost anywhere; perplexity is then that of the whole model with these K blocks quantized.

Kernels are compiled anew in every run: wall times hold compilation, seconds a step do not. The last line of standard
output is JSON. Other work on the machine spoils times: see `other_cpu_share`.
"""

import argparse
import json
import os
import shlex
import shutil
import signal
import statistics
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from peers_process import ProcessFailed, run_process
from peers_truncate import graft, read_headers, truncate
from peers_workers import PEERS

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from shardq.logs import Event  # noqa: E402  the checkout comes first on the path
from shardq.rundir.record import RunRecord  # noqa: E402

HERE = Path(__file__).resolve().parent
CALIB_COLUMN, EVAL_COLUMN = "calib_ids", "eval_ids"
RATIOS = {"step": "seconds_per_step_median", "wall": "wall_seconds", "peak_rss": "peak_rss_bytes"}
MIB = 1 << 20
MAX_OTHER_SHARE = 0.05  # beyond it times say little: a step beside another job has taken eight times as long


@dataclass(frozen=True)
class Bench:
    """What all runs share: the options, the model that is quantized, and the folder for results."""

    options: argparse.Namespace
    model: Path
    folder: Path

    def run(self, name: str, command: list[object], folder: Path = HERE) -> tuple[dict, dict]:
        """Run a program whose last line is JSON; give that, and what the process cost."""
        threads = str(self.options.threads)
        environment = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        with tempfile.TemporaryDirectory(prefix="compiled-", dir=self.folder) as compiled:
            environment["TORCHINDUCTOR_CACHE_DIR"] = compiled
            line, cost = run_process([*map(str, command)], self.folder / name, environment, folder)
        try:
            return json.loads(line), asdict(cost)
        except json.JSONDecodeError:
            raise ProcessFailed(f"{command[1]}: its last line is no JSON: {line!r}; --output keeps its log") from None


def main(arguments: list[str] | None = None) -> None:
    """Command line: run, measure, evaluate, print a table and one line of JSON; exit code 1 if a run failed."""
    options = parse(arguments)
    if options.output is None:
        with tempfile.TemporaryDirectory(prefix="peers-") as folder:
            failed = compare(options, Path(folder))
    else:
        if options.output.exists() and any(options.output.iterdir()):
            raise SystemExit(f"peers: {options.output}: holds files already; choose another --output")
        options.output.mkdir(parents=True, exist_ok=True)
        failed = compare(options, options.output.resolve())
    sys.exit(1 if failed else 0)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Options from the command line, paths made absolute."""
    parser = make_parser(__doc__)
    parser.add_argument("--iterations", type=int, required=True, help="optimizer steps a block, of one sample each")
    parser.add_argument("--blocks", type=int, help="only the first K decoder blocks (default: all)")
    parser.add_argument("--shardq-options", type=shlex.split, default=[], help="more options of launch/quantize.py")
    parser.add_argument("--skip-eval", action="store_true", help="no perplexities")
    parser.add_argument("--output", type=Path, help="new folder for checkpoints and logs (default: none are kept)")
    return with_paths(parser.parse_args(arguments))


def make_parser(description: str) -> argparse.ArgumentParser:
    """The options of every comparison: model, tokens, threads, environments."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the float model")
    parser.add_argument("--ids", type=Path, required=True, help="safetensors file of token ids")
    parser.add_argument("--samples", type=int, default=32, help="calibration samples (default 32)")
    parser.add_argument("--threads", type=int, default=2, help="threads of each run (default 2)")
    for name, peer in PEERS.items():
        parser.add_argument(f"--{name}", type=Path, help=f"python that has {peer.package}; not given: it is left out")
    parser.add_argument(
        "--autoround-dtype", choices=("default", "float32"), default="default",
        help="default: what AutoRound chooses, bfloat16 where the processor has it",
    )  # fmt: skip
    parser.add_argument(
        "--checkout", type=Path, default=HERE.parents[2], help="shardq that is measured and evaluates (default: this)"
    )
    parser.add_argument("--eval-samples", type=int, help="sequences to evaluate on (default: all in the file)")
    return parser


def with_paths(options: argparse.Namespace) -> argparse.Namespace:
    """The same options with absolute paths, that exist."""
    for name in ("model", "ids", "checkout"):
        setattr(options, name, getattr(options, name).resolve())
        if not getattr(options, name).exists():
            raise SystemExit(f"peers: {getattr(options, name)}: no such file or folder; check --{name}")
    for name in PEERS:  # made absolute, not resolved: a venv's python is a link
        if path := getattr(options, name):
            setattr(options, name, Path(os.path.abspath(path)))
    return options


def compare(options: argparse.Namespace, folder: Path) -> list[str]:
    """Run everything and print it; give the names of the runs that failed."""
    bench = Bench(options, options.model, folder)
    if options.blocks is not None:
        bench = Bench(options, folder / "truncated", folder)
        truncate(options.model, bench.model, options.blocks)
    rows, failed = [], []
    measures = {"float": float_row, **dict.fromkeys(PEERS, peer_row), "shardq": shardq_row}
    for name, measure in measures.items():
        if measure is float_row and options.skip_eval:
            continue
        if measure is peer_row and getattr(options, name) is None:
            say(f"{name}: skipped, no --{name} given")
            continue
        try:
            rows.append(measure(bench, name))
            if not options.skip_eval:
                rows[-1]["perplexity"] = perplexity(bench, name)
        except ProcessFailed as error:
            say(f"{name}: failed: {error}")
            failed.append(name)
            continue
        say(f"{name}: {json.dumps(rows[-1])}")  # at once: hours may be lost with a later run
        if (share := rows[-1].get("other_cpu_share", 0)) > MAX_OTHER_SHARE:
            say(f"{name}: {share:.0%} of the processor went to other work: its times are spoiled; run it again alone")
    print(table(rows))
    print(json.dumps(result(options, rows)), flush=True)
    return failed


def float_row(bench: Bench, name: str) -> dict:
    """The model itself, of which there is only a perplexity."""
    return {"name": name}


def peer_command(bench: Bench, name: str, output: Path) -> list[object]:
    """Command line of a peer's worker in its environment; more of the worker's options may follow."""
    options, peer = bench.options, PEERS[name]
    command = [
        getattr(options, name), peer.worker, "--model", bench.model, "--ids", options.ids,
        "--column", CALIB_COLUMN, "--samples", options.samples, "--threads", options.threads, "--output", output,
    ]  # fmt: skip
    for option, ours in peer.options.items():
        command += [option, getattr(options, ours)]
    return command


def peer_row(bench: Bench, name: str) -> dict:
    """Run a peer's worker in its environment."""
    facts, cost = bench.run(name, peer_command(bench, name, bench.folder / name))
    return {"name": name} | facts | cost


def shardq_command(bench: Bench, output: Path) -> list[object]:
    """Command line of launch/quantize.py on one rank in this environment; more of its options may follow."""
    options = bench.options
    return [
        sys.executable, "launch/quantize.py", "--model", bench.model,
        "--calib.dataset", options.ids, "--calib.column", CALIB_COLUMN, "--calib.samples", options.samples,
        "--calib.sequence_length", length_of(options.ids, CALIB_COLUMN),
        "--optimize.iterations", options.iterations, "--optimize.batch_size", 1,
        "--output", output,
    ]  # fmt: skip


def shardq_row(bench: Bench, name: str) -> dict:
    """Run launch/quantize.py and read what it says of itself."""
    options, output = bench.options, bench.folder / name
    summary, cost = bench.run(name, [*shardq_command(bench, output), *options.shardq_options], options.checkout)
    record = RunRecord.read(output)
    facts = {"peak_rss_bytes": summary["peak_rss_bytes"], "dtype": record.options("optimize")["precision"]}
    facts |= train_statistics(record.events())
    return {"name": name} | facts | cost


def perplexity(bench: Bench, name: str) -> float:
    """Perplexity of the model with a run's quantized blocks in place, by shardq's own evaluation."""
    options, model = bench.options, bench.folder / name
    if name == "float":
        return evaluate(bench, name, options.model)
    if options.blocks is None:
        return evaluate(bench, name, model)
    whole = bench.folder / f"{name}-whole"
    graft(options.model, model, whole, options.blocks)
    try:
        return evaluate(bench, name, whole)
    finally:
        shutil.rmtree(whole)


def evaluate(bench: Bench, name: str, model: Path) -> float:
    """Perplexity of a checkpoint by launch/evaluate.py."""
    options = bench.options
    command = [
        sys.executable, "launch/evaluate.py", "--model", model, "--eval.dataset", options.ids,
        "--eval.column", EVAL_COLUMN, "--eval.sequence_length", length_of(options.ids, EVAL_COLUMN),
    ]  # fmt: skip
    if options.eval_samples is not None:
        command += ["--eval.samples", options.eval_samples]
    return bench.run(f"{name}-evaluation", command, options.checkout)[0]["perplexity"]


def length_of(ids: Path, column: str) -> int:
    """Tokens a sequence in one tensor of a file of token ids."""
    tensors = read_headers([ids])
    if column not in tensors:
        raise SystemExit(f"peers: {ids}: has no tensor {column}; name the calibration ids {CALIB_COLUMN}, the "
                         f"evaluation ids {EVAL_COLUMN}")  # fmt: skip
    return tensors[column].shape[1]


def train_statistics(events: Iterable[Event]) -> dict[str, object]:
    """Seconds a step of shardq from its events: median and mean over blocks, and each block's, of rank 0."""
    spans = [event for event in events if event.span == "train" and event.rank == 0]
    blocks = [span.seconds / span.facts["iterations"] for span in spans]
    return {
        "seconds_per_step_median": statistics.median(blocks) if blocks else None,
        "seconds_per_step_mean": statistics.fmean(blocks) if blocks else None,
        "seconds_per_step_by_block": [round(seconds, 6) for seconds in blocks],
    }


def ratios(rows: list[dict]) -> dict[str, dict[str, float | None]]:
    """What each peer needs over what shardq needs; above 1 shardq is better. Empty without shardq."""
    by_name = {row["name"]: row for row in rows if row["name"] != "float"}
    shardq = by_name.pop("shardq", None)
    if shardq is None:
        return {}
    return {
        name: {label: _ratio(row[field], shardq[field]) for label, field in RATIOS.items()}
        for name, row in by_name.items()
    }


def _ratio(peer: float | None, shardq: float | None) -> float | None:
    return round(peer / shardq, 3) if peer and shardq else None


def result(options: argparse.Namespace, rows: list[dict]) -> dict:
    """The closing JSON object."""
    chosen = ("iterations", "samples", "blocks", "threads", "eval_samples", "autoround_dtype", "shardq_options")
    facts = {name: getattr(options, name) for name in chosen}
    return facts | {"processor": processor(), "rows": rows, "ratios": ratios(rows)}


def processor() -> str:
    """Number of cores, the processor's name and the widest vector instructions it has."""
    lines = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line)
    fields = {key.strip(): value.strip() for key, value in lines.items()}
    flags = [flag for flag in fields.get("flags", "").split() if flag.startswith(("avx", "amx"))]
    return f"{os.cpu_count()} x {fields.get('model name', 'unknown')} ({' '.join(flags)})"


def table(rows: list[dict]) -> str:
    """A plain table, a line a run."""
    titles = ("", "s/step median", "s/step mean", "wall s", "CPU s", "peak MiB", "other CPU", "perplexity", "dtype")
    lines = [titles]
    for row in rows:
        peak = row.get("peak_rss_bytes")
        lines.append((
            row["name"], _number(row.get("seconds_per_step_median"), 4), _number(row.get("seconds_per_step_mean"), 4),
            _number(row.get("wall_seconds"), 1), _number(row.get("cpu_seconds"), 1), _number(peak and peak / MIB, 0),
            _number(row.get("other_cpu_share"), 2), _number(row.get("perplexity"), 3), row.get("dtype") or "-",
        ))  # fmt: skip
    widths = [max(len(line[column]) for line in lines) for column in range(len(titles))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def say(text: str) -> None:
    """Print a line of progress."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the run under way is ended too
    main()
