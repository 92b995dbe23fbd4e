"""How fast a finished run is converted to each format, beside the disk's write speed measured just before and after.

    python tools/bench/export.py --run runs/mine --formats compressed-tensors gptq hf aimet

Each conversion is that of `launch/export.py`, its checks of the run's digests included, starting Python not. The disk's
speed is that of one file of random bytes, as long as the format's own files but 64 MiB at least, written and synced in
the same folder. One JSON line a format; above it, with `--profile`, where the processor's seconds went. Where these are
few beside the others, other programs had the machine.
"""

import argparse
import cProfile
import json
import os
import pstats
import shutil
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from shardq.cli import parse  # noqa: E402  the checkout comes first on the path
from shardq.commands.export import export  # noqa: E402
from shardq.parallel.ranks import started  # noqa: E402

MIN_BYTES = 64 << 20
CHUNK_BYTES = 8 << 20


def main() -> None:
    """Convert to each format in turn and print its line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="output folder of a finished run")
    parser.add_argument("--formats", nargs="+", default=["compressed-tensors", "gptq", "hf", "aimet"])
    parser.add_argument("--folder", default=None, help="where to write (default: beside the run)")
    parser.add_argument("--profile", action="store_true", help="print the functions that take longest")
    options = parser.parse_args()
    for chosen in options.formats:
        with tempfile.TemporaryDirectory(dir=options.folder or Path(options.run).resolve().parent) as folder:
            print(json.dumps(measure(options, chosen, Path(folder))), flush=True)


def measure(options: argparse.Namespace, chosen: str, folder: Path) -> dict:
    """Seconds, of the processor's too, and MB/s of one conversion; the disk's MB/s, the better of before and after."""
    converted, profile = folder / "converted", cProfile.Profile(time.process_time)
    config = parse("export", [options.run, "--format", chosen, "--output", str(converted)])
    before = disk_speed(folder, MIN_BYTES)
    with started("cpu") as ranks:
        start, cpu_start = time.perf_counter(), time.process_time()
        if options.profile:
            profile.enable()
        num_bytes = export(config, ranks)["bytes"]
        profile.disable()
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    shutil.rmtree(converted)
    disk = max(before, disk_speed(folder, max(MIN_BYTES, num_bytes)))
    if options.profile:
        pstats.Stats(profile, stream=sys.stderr).sort_stats("tottime").print_stats(15)
    speed = num_bytes / 1e6 / seconds
    return {
        "format": chosen,
        "bytes": num_bytes,
        "seconds": round(seconds, 3),
        "cpu_seconds": round(cpu_seconds, 3),
        "mb_per_second": round(speed, 1),
        "disk_mb_per_second": round(disk, 1),
        "share_of_disk": round(speed / disk, 3),
    }


def disk_speed(folder: Path, num_bytes: int) -> float:
    """MB/s of writing and syncing one file."""
    chunk, path = os.urandom(CHUNK_BYTES), folder / "disk"
    start = time.perf_counter()
    with open(path, "wb") as file:
        for _ in range(-(-num_bytes // CHUNK_BYTES)):
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    written = path.stat().st_size
    path.unlink()
    return written / 1e6 / seconds


if __name__ == "__main__":
    main()
