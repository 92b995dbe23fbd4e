"""Streams a tiny model of every family that transformers can build against transformers' own, and prints what came.

Usage: PYTHONPATH=. python tools/family_sweep.py RESULT.json [FAMILY ...]

RESULT.json is written after each family; families that it holds are not run again. RESULT.md, beside it, is a table.
"""

import json
import os
import sys
import time
import warnings
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict
from pathlib import Path

import torch

TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "families")]
from sweep import OUTCOMES, families, sweep  # noqa: E402


def table(rows):
    """The counts and the rows as Markdown."""
    counts = Counter(row["outcome"] for row in rows)
    lines = [", ".join(f"{counts[outcome]} {outcome}" for outcome in OUTCOMES if counts[outcome]) + ".", ""]
    lines += ["| family | outcome | at | detail |", "|---|---|---|---|"]
    for row in sorted(rows, key=lambda row: (OUTCOMES.index(row["outcome"]), row["family"])):
        lines.append(f"| {row['family']} | {row['outcome']} | {row['stage']} | {row['detail'].replace('|', '/')} |")
    return "\n".join(lines) + "\n"


def main(result, *chosen):
    """Runs the chosen families, or all, and keeps what came of each."""
    path = Path(result)
    rows = json.loads(path.read_text()) if path.exists() else []
    for family in chosen or families():
        if family in {row["family"] for row in rows}:
            continue
        start = time.perf_counter()
        with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere), redirect_stdout(nowhere):
            row = asdict(sweep(family))
        rows.append(row | {"seconds": round(time.perf_counter() - start, 2)})
        path.write_text(json.dumps(rows, indent=1) + "\n")
        path.with_suffix(".md").write_text(table(rows))
        print(f"{row['family']}: {row['outcome']} {row['stage']} {row['detail']}", flush=True)
    print(table(rows).splitlines()[0])


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if not sys.argv[1:]:
        raise SystemExit("family_sweep: name a file for the result, such as sweep.json")
    main(*sys.argv[1:])
