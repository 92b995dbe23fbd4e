#!/usr/bin/env python
"""Accuracy of shardq and its peers over bits and group sizes, on one model, from the same token ids.

    python tools/bench/accuracy.py --model DIR --ids FILE --bits 4 3 --group-size -1 64 --iterations 200 \\
        --variant "default=" --variant "mix=--optimize.fp_mix 0.5" --autoround PYTHON

Symmetric grids on the decoder linears; iterations of one sample. FILE holds int tensors `calib_ids` and `eval_ids`
[sequences, length]. One line of JSON a cell: `method`, `bits`, `group_size`, `samples`, `iterations`, `perplexity`,
`kl`, `top1` (see agreement.py), `seconds` (the whole process), `peak_rss_bytes`, `other_cpu_share`. A variant is a name
and options of launch/quantize.py; `rtn=--quant.method rtn` rounds to nearest. The runs follow one another.
"""

import argparse
import json
import shlex
import shutil
import sys
import tempfile
from itertools import product
from pathlib import Path

from peers import CALIB_COLUMN, EVAL_COLUMN, HERE, Bench, length_of, say
from peers_process import ProcessFailed

WORKERS = {"aimet": "aimet_adascale.py", "autoround": "autoround_tuning.py"}


def variant(text: str) -> tuple[str, list[str]]:
    """A variant's name and its options."""
    name, equals, options = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"{text!r}: give NAME=OPTIONS, such as 'mix=--optimize.fp_mix 0.5'")
    return name, shlex.split(options)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Options from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the float model")
    parser.add_argument("--ids", type=Path, required=True, help="safetensors file of token ids")
    parser.add_argument("--bits", type=int, nargs="+", default=[4])
    parser.add_argument("--group-size", type=int, nargs="+", default=[-1], help="-1: per-channel")
    parser.add_argument("--samples", type=int, default=32, help="calibration samples (default 32)")
    parser.add_argument("--iterations", type=int, default=200, help="optimizer steps a block (default 200)")
    parser.add_argument("--variant", type=variant, action="append", default=[], help="NAME=OPTIONS of ours; repeatable")
    parser.add_argument("--aimet", type=Path, help="python that has aimet-torch; not given: left out")
    parser.add_argument("--autoround", type=Path, help="python that has auto-round; not given: left out")
    parser.add_argument("--eval-samples", type=int, help="sequences to evaluate on (default: all)")
    parser.add_argument("--threads", type=int, default=2, help="threads of each run (default 2)")
    options = parser.parse_args(arguments)
    options.model, options.ids = options.model.resolve(), options.ids.resolve()
    return options


def our_command(options: argparse.Namespace, bits: int, group_size: int, more: list[str]) -> list[object]:
    """Command line of a run of shardq, without its output folder."""
    return [
        sys.executable, HERE.parents[1] / "launch" / "quantize.py", "--model", options.model,
        "--calib.dataset", options.ids, "--calib.column", CALIB_COLUMN, "--calib.samples", options.samples,
        "--calib.sequence_length", length_of(options.ids, CALIB_COLUMN), "--quant.bits", bits,
        "--quant.group_size", group_size, "--optimize.iterations", options.iterations, "--optimize.batch_size", 1,
        *more,
    ]  # fmt: skip


def peer_command(options: argparse.Namespace, bits: int, group_size: int, name: str) -> list[object]:
    """Command line of a peer's worker, without its output folder."""
    return [
        getattr(options, name), HERE / "peers" / WORKERS[name], "--model", options.model, "--ids", options.ids,
        "--column", CALIB_COLUMN, "--samples", options.samples, "--iterations", options.iterations,
        "--threads", options.threads, "--bits", bits, "--group-size", group_size,
    ]  # fmt: skip


def cell(bench: Bench, name: str, command: list[object]) -> dict:
    """Quantize, compare with the float model, and forget the checkpoint."""
    options, output = bench.options, bench.folder / "output"
    try:
        facts, cost = bench.run(name, [*command, "--output", output])
        compared = [
            sys.executable, HERE / "agreement.py", "--reference", options.model, "--ids", options.ids,
            "--column", EVAL_COLUMN, output,
        ]  # fmt: skip
        if options.eval_samples is not None:
            compared += ["--samples", options.eval_samples]
        figures, _ = bench.run(f"{name}-agreement", compared)
    finally:
        shutil.rmtree(output, ignore_errors=True)
    return {
        "perplexity": round(figures["perplexity"], 4),
        "kl": round(figures["kl"], 5),
        "top1": round(figures["top1"], 4),
        "seconds": round(cost["wall_seconds"], 1),
        "peak_rss_bytes": facts["peak_rss_bytes"],
        "other_cpu_share": round(cost["other_cpu_share"], 3),
    }


def main() -> None:
    """Run every cell and print it; exit code 1 if one failed."""
    options, failed = parse(), False
    with tempfile.TemporaryDirectory(prefix="accuracy-") as folder:
        bench = Bench(options, options.model, Path(folder))
        for bits, group_size in product(options.bits, options.group_size):
            commands = {name: our_command(options, bits, group_size, more) for name, more in options.variant}
            for name in WORKERS:
                if getattr(options, name):
                    commands[name] = peer_command(options, bits, group_size, name)
            for name, command in commands.items():
                facts = {"method": name, "bits": bits, "group_size": group_size, "samples": options.samples,
                         "iterations": options.iterations}  # fmt: skip
                try:
                    print(json.dumps(facts | cell(bench, name, command)), flush=True)
                except ProcessFailed as error:
                    failed = True
                    say(f"{name}, {bits} bits, group size {group_size}: {error}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
