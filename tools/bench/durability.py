#!/usr/bin/env python
"""Share of a run's seconds that making it durable takes: syncs, digests of files, checksums of activations.

    python tools/bench/durability.py --model path/to/model --blocks 3 --output OUT -- --calib.dataset ids.safetensors

What follows `--` goes to quantize, which runs in this process. Syncs and checksums of activations are mostly done in
the background, beside the computation: `waited` is what the computation itself spent. The last line is JSON.
"""

import argparse
import hashlib
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from peers_truncate import truncate  # noqa: E402

from shardq.cli import parse  # noqa: E402  the checkout comes first on the path
from shardq.commands.quantize import quantize  # noqa: E402
from shardq.formats import tensor_file  # noqa: E402
from shardq.parallel.ranks import started  # noqa: E402
from shardq.rundir.record import RunRecord  # noqa: E402
from shardq.verbs import return_freed_tensors  # noqa: E402

COSTS = {"sync": (os, "fsync"), "digest": (hashlib, "file_digest"), "checksum": (tensor_file, "_checksum")}


def measured(work: Callable[[], object]) -> dict[str, dict[str, float]]:
    """Calls, seconds, and the part of these that the main thread spent, of each cost during some work."""
    costs = {kind: {"calls": 0, "seconds": 0.0, "waited": 0.0} for kind in COSTS}
    originals = {kind: getattr(owner, name) for kind, (owner, name) in COSTS.items()}

    def timed(kind: str) -> Callable:
        def call(*args: object, **kwargs: object) -> object:
            start = time.perf_counter()
            try:
                return originals[kind](*args, **kwargs)
            finally:
                seconds = time.perf_counter() - start
                costs[kind]["calls"] += 1
                costs[kind]["seconds"] += seconds
                if threading.current_thread() is threading.main_thread():
                    costs[kind]["waited"] += seconds

        return call

    for kind, (owner, name) in COSTS.items():
        setattr(owner, name, timed(kind))
    try:
        work()
    finally:
        for kind, (owner, name) in COSTS.items():
            setattr(owner, name, originals[kind])
    return costs


def main() -> None:
    """Parse the command line, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--blocks", type=int, required=True, help="the model is cut after so many")
    parser.add_argument("--output", type=Path, required=True, help="of the run; not there yet")
    parser.add_argument("quantize", nargs="*", help="options of quantize, after --")
    options = parser.parse_args()
    return_freed_tensors()
    with tempfile.TemporaryDirectory() as temporary:
        model = Path(temporary) / "model"
        truncate(options.model, model, options.blocks)
        config = parse("quantize", ["--model", str(model), "--output", str(options.output), *options.quantize])
        with started(config.device) as ranks:
            costs = measured(lambda: quantize(config, ranks))
    spans = [event for event in RunRecord.read(options.output).events() if event.rank == 0]
    seconds = {name: sum(event.seconds for event in spans if event.span == name)
               for name in ("run", "start-up", "compile")}  # fmt: skip
    working = seconds["run"] - seconds["start-up"] - seconds["compile"]
    print(f"{'':10}{'calls':>8}{'seconds':>10}{'share':>8}{'waited':>10}{'share':>8}")
    for kind, cost in costs.items():
        print(f"{kind:10}{cost['calls']:8d}{cost['seconds']:10.3f}{cost['seconds'] / working:8.2%}"
              f"{cost['waited']:10.3f}{cost['waited'] / working:8.2%}")  # fmt: skip
    print(json.dumps({"run_seconds": seconds["run"], "without_start_up_and_compiling": working, "costs": costs}))


if __name__ == "__main__":
    main()
