#!/usr/bin/env python
"""Runs a whole quantization and shows where its seconds went, from the start of the process to the loadable output.

    python tools/bench/run.py --ranks 2 -- --model path/to/model --optimize.iterations 200 ...

What follows `--` goes to launch/quantize.py. The last line is JSON: seconds, peak memory, and the span table.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from shardq.logs import Event  # noqa: E402  the checkout comes first on the path
from shardq.rundir.record import RunRecord  # noqa: E402

QUANTIZE = Path(__file__).parents[2] / "launch" / "quantize.py"
TRAINING = ("train",)


def span_table(spans: list[Event]) -> list[dict]:
    """Spans of the same name added up, the longest first, and what no span accounts for.

    Each row has `span`, `seconds`, `share` of the run, `count`, `waiting_for_input`, `waiting_for_output` (seconds,
    part of the span's own).
    """
    (run,) = [event.seconds for event in spans if event.span == "run"]
    rows: dict[str, dict] = {}
    for event in spans:
        if event.span == "run":
            continue
        row = rows.setdefault(
            event.span,
            {"span": event.span, "seconds": 0.0, "count": 0, "waiting_for_input": 0.0, "waiting_for_output": 0.0},
        )
        row["count"] += 1
        row["seconds"] += event.seconds
        for name in ("waiting_for_input", "waiting_for_output"):
            row[name] += event.facts.get(name, 0.0)
    accounted = sum(row["seconds"] for row in rows.values())
    nothing = {"count": 0, "waiting_for_input": 0.0, "waiting_for_output": 0.0}
    rows["unaccounted"] = {"span": "unaccounted", "seconds": run - accounted, **nothing}
    table = sorted(rows.values(), key=lambda row: -row["seconds"])
    return [{**row, "share": row["seconds"] / run} for row in table]


def summarize(spans: list[Event]) -> dict:
    """The span table, and the shares that matter: outside training, and waiting."""
    table = span_table(spans)
    (run,) = [event.seconds for event in spans if event.span == "run"]
    steps = [(event.seconds, event.facts["iterations"]) for event in spans if event.span == "train"]
    outside = sum(row["seconds"] for row in table if row["span"] not in TRAINING)
    return {
        "run_seconds": round(run, 3),
        "ms_per_step": round(1e3 * sum(s for s, _ in steps) / max(1, sum(i for _, i in steps)), 3),
        "share_outside_training": round(outside / run, 4),
        "share_waiting_for_input": round(sum(row["waiting_for_input"] for row in table) / run, 4),
        "share_waiting_for_output": round(sum(row["waiting_for_output"] for row in table) / run, 4),
        "spans": [{name: _rounded(value) for name, value in row.items()} for row in table],
    }


def _rounded(value: object) -> object:
    return round(value, 4) if isinstance(value, float) else value


def launch(ranks: int, threads: int | None, arguments: list[str], output: Path) -> tuple[dict, float]:
    """Run the command; give its summary and the wall seconds of the whole process."""
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += [str(QUANTIZE), *arguments, "--output", str(output)]
    environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    start = time.perf_counter()
    finished = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    wall = time.perf_counter() - start
    if finished.returncode:
        sys.exit(f"tools/bench/run.py: launch/quantize.py ended with code {finished.returncode}; its message is above")
    lines = finished.stdout.strip().splitlines()
    print("\n".join(lines[:-1]))
    return json.loads(lines[-1]), wall


def main() -> None:
    """Parse the command line, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--threads", type=int, help="threads of each rank (default: the library's choice)")
    parser.add_argument("--output", type=Path, help="keep the run's output in this folder (default: a temporary one)")
    parser.add_argument("quantize", nargs="+", help="options of launch/quantize.py, after --")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        output = options.output or Path(temporary) / "run"
        summary, wall = launch(options.ranks, options.threads, options.quantize, output)
        result = summarize([event for event in RunRecord.read(output).events() if event.rank == 0])
    print(f"{'span':22}{'seconds':>10}{'share':>8}{'count':>7}{'wait in':>9}{'wait out':>9}")
    for row in result["spans"]:
        print(f"{row['span']:22}{row['seconds']:10.2f}{row['share']:8.1%}{row['count']:7d}"
              f"{row['waiting_for_input']:9.2f}{row['waiting_for_output']:9.2f}")  # fmt: skip
    result |= {"wall_seconds": round(wall, 3), "peak_rss_bytes": summary["peak_rss_bytes"], "ranks": options.ranks}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
