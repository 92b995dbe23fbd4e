#!/usr/bin/env python
"""Accuracy of shardq and its peers over bits and group sizes, on one model, from the same token ids.

    python tools/bench/accuracy.py --model DIR --ids FILE --bits 4 3 --group-size -1 64 --iterations 200 \\
        --variant "default=" --variant "mix=--optimize.fp_mix 0.5" --autoround PYTHON --llmcompressor PYTHON

Symmetric grids on the decoder linears; iterations of one sample. FILE holds int tensors `calib_ids` and `eval_ids`
[sequences, length]. One line of JSON a cell: `method`, `bits`, `group_size`, `samples`, `iterations`, `perplexity`,
`kl`, `top1` (see agreement.py), `seconds` (the whole process), `peak_rss_bytes`, `other_cpu_share`. A variant is a name
and options of launch/quantize.py; `rtn=--quant.method rtn` rounds to nearest. The runs follow one another.
`iterations` is the option's, though rounding and GPTQ take none.
"""

import argparse
import json
import shlex
import shutil
import sys
import tempfile
from itertools import product
from pathlib import Path

from peers import (
    EVAL_COLUMN,
    HERE,
    Bench,
    make_parser,
    peer_command,
    say,
    shardq_command,
    with_paths,
)
from peers_process import ProcessFailed
from peers_workers import PEERS


def variant(text: str) -> tuple[str, list[str]]:
    """A variant's name and its options."""
    name, equals, options = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"{text!r}: give NAME=OPTIONS, such as 'mix=--optimize.fp_mix 0.5'")
    return name, shlex.split(options)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Options from the command line, paths made absolute."""
    parser = make_parser(__doc__)
    parser.add_argument("--iterations", type=int, default=200, help="optimizer steps a block (default 200)")
    parser.add_argument("--bits", type=int, nargs="+", default=[4])
    parser.add_argument("--group-size", type=int, nargs="+", default=[-1], help="-1: per-channel")
    parser.add_argument("--variant", type=variant, action="append", default=[], help="NAME=OPTIONS of ours; repeatable")
    return with_paths(parser.parse_args(arguments))


def cell(bench: Bench, name: str, bits: int, group_size: int) -> dict:
    """Quantize with one method, compare with the float model, and forget the checkpoint."""
    options, output, variants = bench.options, bench.folder / "output", dict(bench.options.variant)
    try:
        if name in variants:
            grid = ["--quant.bits", bits, "--quant.group_size", group_size]
            command = [*shardq_command(bench, output), *grid, *variants[name]]
            facts, cost = bench.run(name, command, options.checkout)
        else:
            grid = ["--bits", bits, "--group-size", group_size]
            facts, cost = bench.run(name, [*peer_command(bench, name, output), *grid])
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
    methods = [*dict(options.variant), *(name for name in PEERS if getattr(options, name))]
    with tempfile.TemporaryDirectory(prefix="accuracy-") as folder:
        bench = Bench(options, options.model, Path(folder))
        for bits, group_size, name in product(options.bits, options.group_size, methods):
            facts = {"method": name, "bits": bits, "group_size": group_size, "samples": options.samples,
                     "iterations": options.iterations}  # fmt: skip
            try:
                print(json.dumps(facts | cell(bench, name, bits, group_size)), flush=True)
            except ProcessFailed as error:
                failed = True
                say(f"{name}, {bits} bits, group size {group_size}: {error}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
