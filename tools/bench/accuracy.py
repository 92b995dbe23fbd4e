#!/usr/bin/env python
"""Accuracy of shardq and its peers over bits and group sizes, on one model, from the same token ids.

    python tools/bench/accuracy.py --model DIR --ids FILE --bits 4 3 --group-size -1 64 --iterations 200 \\
        --variant "default=" --variant "mix=--optimize.fp_mix 0.5" --autoround PYTHON --llmcompressor PYTHON

Symmetric grids on the decoder linears; iterations of one sample. FILE holds int tensors `calib_ids` and `eval_ids`
[sequences, length]. One line of JSON a cell: `method`, `bits`, `group_size`, `samples`, `iterations`, `perplexity`,
`kl`, `top1` (see agreement.py), `seconds` (the whole process), `peak_rss_bytes`, `other_cpu_share`. A variant is a name
and options of launch/quantize.py; `rtn=--quant.method rtn` rounds to nearest. The runs follow one another.
`iterations` is the option's, though rounding and GPTQ take none. `--tune OPTIONS` adds a line for each variant whose
scales launch/tune.py has tuned with these options ("" for none); its seconds are those of both.

`--blocks K` quantizes the first K decoder blocks only; the figures are those of the whole model with these K in place.
`--sets N` runs every cell on N disjoint sets of the calibration samples; a last line for each method and grid then has
the mean, least and largest `kl`, and the same of its ratio to the first method's on the same set.
"""

import argparse
import copy
import json
import shlex
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path

from safetensors.numpy import load_file, save_file

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "peers"))

from peers import (  # noqa: E402
    CALIB_COLUMN,
    EVAL_COLUMN,
    Bench,
    make_parser,
    peer_command,
    say,
    shardq_command,
    with_paths,
)
from peers_process import ProcessFailed  # noqa: E402
from peers_truncate import graft, truncate  # noqa: E402
from peers_workers import PEERS  # noqa: E402


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
    parser.add_argument("--tune", type=shlex.split, help="options of launch/tune.py: each variant, tuned, too")
    parser.add_argument("--blocks", type=int, help="only the first K decoder blocks (default: all)")
    parser.add_argument("--sets", type=int, default=1, help="disjoint sets of calibration samples (default 1)")
    options = parser.parse_args(arguments)
    if options.tune is not None and options.blocks is not None:
        parser.error("--tune is for whole models; leave --blocks out")
    return with_paths(options)


def bench_of(options: argparse.Namespace, number: int, folder: Path) -> Bench:
    """What the cells on one set of samples share: its token ids, and the model, cut after `--blocks`."""
    if options.sets > 1:
        ids, start = load_file(options.ids), number * options.samples
        ids[CALIB_COLUMN] = ids[CALIB_COLUMN][start : start + options.samples]
        if len(ids[CALIB_COLUMN]) < options.samples:
            needed = options.sets * options.samples
            raise SystemExit(f"accuracy: {options.ids}: {needed} sequences in {CALIB_COLUMN} are needed for --sets")
        options = copy.copy(options)
        options.ids = folder / f"set-{number}.safetensors"
        save_file(ids, options.ids)
    if options.blocks is None:
        return Bench(options, options.model, folder)
    model = folder / "truncated"
    if not model.exists():
        truncate(options.model, model, options.blocks)
    return Bench(options, model, folder)


def cells(bench: Bench, name: str, bits: int, group_size: int) -> Iterator[dict]:
    """Quantize with one method, compare with the float model, and forget the checkpoint; tuned, too, if asked."""
    options, output, variants = bench.options, bench.folder / "output", dict(bench.options.variant)
    whole, tuned = output if options.blocks is None else bench.folder / "whole", bench.folder / "tuned"
    try:
        if name in variants:
            grid = ["--quant.bits", bits, "--quant.group_size", group_size]
            # The last of some first blocks is not what the head stands behind.
            cut = [] if options.blocks is None else ["--optimize.last_block", "output"]
            command = [*shardq_command(bench, output), *grid, *cut, *variants[name]]
            facts, cost = bench.run(name, command, options.checkout)
        else:
            grid = ["--bits", bits, "--group-size", group_size]
            facts, cost = bench.run(name, [*peer_command(bench, name, output), *grid])
        if options.blocks is not None:
            graft(options.model, output, whole, options.blocks)
        yield {"method": name} | figures(bench, name, whole) | cost_of(facts, cost)
        if name in variants and options.tune is not None:
            command = [sys.executable, "launch/tune.py", output, "--model", bench.model, "--output", tuned]
            more_facts, more_cost = bench.run(f"{name}-tuning", [*command, *options.tune], options.checkout)
            spent = cost_of(more_facts, more_cost)
            spent["seconds"] = round(spent["seconds"] + cost["wall_seconds"], 1)
            yield {"method": f"{name}, tuned"} | figures(bench, name, tuned) | spent
    finally:
        for folder in {output, whole, tuned}:
            shutil.rmtree(folder, ignore_errors=True)


def figures(bench: Bench, name: str, folder: Path) -> dict:
    """How near the model in a folder is to the float model."""
    options = bench.options
    compared = [
        sys.executable, HERE / "agreement.py", "--reference", options.model, "--ids", options.ids,
        "--column", EVAL_COLUMN, folder,
    ]  # fmt: skip
    if options.eval_samples is not None:
        compared += ["--samples", options.eval_samples]
    found, _ = bench.run(f"{name}-agreement", compared)
    return {key: round(found[key], digits) for key, digits in {"perplexity": 4, "kl": 5, "top1": 4}.items()}


def cost_of(facts: dict, cost: dict) -> dict:
    """What a process took."""
    return {
        "seconds": round(cost["wall_seconds"], 1),
        "peak_rss_bytes": facts["peak_rss_bytes"],
        "other_cpu_share": round(cost["other_cpu_share"], 3),
    }


def spread(rows: list[dict]) -> list[dict]:
    """For each method and grid, over the sets: `kl` and its ratio to the first method's, as [mean, least, largest]."""
    cells: dict[tuple, dict[int, float]] = {}
    for row in rows:
        cells.setdefault((row["method"], row["bits"], row["group_size"]), {})[row["set"]] = row["kl"]
    first, lines = rows[0]["method"] if rows else None, []
    for (method, bits, group_size), kls in cells.items():
        base = cells.get((first, bits, group_size), {})
        ratios = [kl / base[number] for number, kl in kls.items() if number in base]
        facts = {"method": method, "bits": bits, "group_size": group_size, "sets": len(kls)}
        lines.append(facts | {"kl": _range([*kls.values()], 5), "kl_to_first": _range(ratios, 4)})
    return lines


def _range(values: list[float], digits: int) -> list[float]:
    return [round(of(values), digits) for of in (statistics.fmean, min, max)] if values else []


def main() -> None:
    """Run every cell and print it; exit code 1 if one failed."""
    options, failed, rows = parse(), False, []
    methods = [*dict(options.variant), *(name for name in PEERS if getattr(options, name))]
    with tempfile.TemporaryDirectory(prefix="accuracy-") as folder:
        for number in range(options.sets):
            bench = bench_of(options, number, Path(folder))
            for bits, group_size, name in product(options.bits, options.group_size, methods):
                facts = {"bits": bits, "group_size": group_size, "samples": options.samples,
                         "iterations": options.iterations, "set": number}  # fmt: skip
                try:
                    for found in cells(bench, name, bits, group_size):
                        rows.append({"method": found["method"]} | facts | found)
                        print(json.dumps(rows[-1]), flush=True)
                except ProcessFailed as error:
                    failed = True
                    say(f"{name}, {bits} bits, group size {group_size}, set {number}: {error}")
    if options.sets > 1:
        print(*map(json.dumps, spread(rows)), sep="\n", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
