"""Streams and quantizes a tiny model of every family that transformers can build, and keeps what came in a table.

Usage: PYTHONPATH=. python tools/family_sweep.py [FAMILY ...]

Without a name all families are run, which takes about half an hour of one core. The table, tests/families/support.tsv,
is written after each family; docs/models.md shows it (python tools/docs_tables.py), and a slow test compares with it.
"""

import os
import sys
import time
import warnings
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import torch

TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "families")]
from sweep import OUTCOMES, TABLE, Row, families, sweep_apart  # noqa: E402


def counted(rows: list[Row]) -> str:
    """How many families came to each outcome."""
    counts = Counter(row.outcome for row in rows)
    return ", ".join(f"{counts[outcome]} {outcome}" for outcome in OUTCOMES if counts[outcome])


def main(table: Path, *chosen: str) -> None:
    """Run the chosen families, or all, and put what came of each in the table, in the place of its former row."""
    known = set(families())
    former = table.read_text().splitlines() if table.exists() else []
    rows = {row.family: row for row in map(Row.parsed, former) if row.family in known}
    for family in chosen or families():
        start = time.perf_counter()
        with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere), redirect_stdout(nowhere):
            rows[family] = sweep_apart(family)
        table.write_text("".join(f"{rows[name]}\n" for name in sorted(rows)))
        print(f"{time.perf_counter() - start:5.1f} s  {rows[family]}", flush=True)
    print(counted(list(rows.values())))


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    main(TABLE, *sys.argv[1:])
