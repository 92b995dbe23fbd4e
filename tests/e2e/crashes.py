"""Runs that are killed, or meet errors of the disk, at chosen calls; `test_crashes.py` and people start it.

Everything is imported once; each run is a fork, so that a run of a small model takes a fraction of a second.

    python tests/e2e/crashes.py points FOLDER 1         each point of one rank, at 1 or at all of its moments
    python tests/e2e/crashes.py redo FOLDER 1           the same while finished blocks are done again
    python tests/e2e/crashes.py random FOLDER NUMBER    that many kills at random points and times, on 1 and 2 ranks
    python tests/e2e/crashes.py errors FOLDER 1         errors of the disk, one or all kinds at each point, on 2 ranks
    python tests/e2e/crashes.py disk FOLDER EVERY       what a power cut leaves after every EVERY-th sync

Prints a JSON line for each crash: what was done, and what is wrong after the same command went on (nothing: "").
"""

import errno
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from disk_model import Disk
from forked_runs import Setting, launch, output_of, what_is_wrong
from runs import result_files
from shardq.cache.store import DiskStore
from shardq.commands import commit as committing
from shardq.commands import quantize as run
from shardq.export import run_output
from shardq.export.checkpoint import Checkpoint
from shardq.formats import tensor_file
from shardq.formats.source import WeightSource
from shardq.optimize.stepper import LocalStepper
from shardq.rundir import ledger
from shardq.training import checkpoint

POINTS = {  # name: where the function is looked up when it is called
    "sync": (os, "fsync"),
    "rename": (os, "replace"),
    "delete": (os, "unlink"),
    "make folder": (os, "mkdir"),
    "write tensors": (tensor_file, "save_file"),
    "ledger line": (ledger, "append_line"),
    "commit": (ledger, "commit"),
    "block files": (run_output, "write_block_files"),
    "export shard": (Checkpoint, "write_shard"),
    "export": (committing, "write_format"),
    "barrier": (committing, "barrier"),
    "step": (LocalStepper, "step"),
    "save checkpoint": (checkpoint, "save"),
    "load checkpoint": (checkpoint, "load"),
    "remove checkpoint": (checkpoint, "remove"),
    "read activations": (DiskStore, "read"),
    "write activations": (DiskStore, "write"),
    "drop activations": (DiskStore, "drop"),
    "read weights": (WeightSource, "read"),
    "finish": (run_output, "write_run_files"),
    "delete cache": (shutil, "rmtree"),
}
ERRORS = (errno.ENOSPC, errno.EIO, errno.EROFS)
WRITES = ("sync", "rename", "make folder", "delete")  # points at which the system may refuse
ADVICE = ("run the same command again", "choose another folder or change its permissions")
TORN = {"write tensors": lambda tensors, path, *_: path, "ledger line": lambda path, line: path}
MOMENTS = ("before", "after", "within")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_at(point: str, moment: str, call: int) -> None:
    """Have this process killed at a call of a function, counted from 1; `within`: half of what it writes is there."""
    owner, name = POINTS[point]
    original, calls = getattr(owner, name), []

    def wrapped(*args: object, **kwargs: object) -> object:
        calls.append(None)
        if len(calls) != call:
            return original(*args, **kwargs)
        if moment == "before":
            die()
        size = torn_from(point, args)
        try:
            return original(*args, **kwargs)
        finally:  # also where it fails, as to delete what is not there does
            if moment == "within":
                path = TORN[point](*args)
                os.truncate(path, (size + path.stat().st_size) // 2)
            die()

    setattr(owner, name, wrapped)


def counted(counts: Path) -> None:
    """Have the number of calls of each point written to a file."""
    numbers = dict.fromkeys(POINTS, 0)

    def count(point: str, original: Callable) -> Callable:
        def wrapped(*args: object, **kwargs: object) -> object:
            numbers[point] += 1
            return original(*args, **kwargs)

        return wrapped

    for point, (owner, name) in POINTS.items():
        setattr(owner, name, count(point, getattr(owner, name)))
    done = run.say_what_is_where
    run.say_what_is_where = lambda *args: (counts.write_text(json.dumps(numbers)), done(*args))


def refused_at(point: str, number: int, call: int) -> None:
    """Have the system refuse a call of a function, and all after it, with an error number."""
    owner, name = POINTS[point]
    original, calls = getattr(owner, name), []

    def wrapped(*args: object, **kwargs: object) -> object:
        calls.append(None)
        if len(calls) >= call:
            raise OSError(number, os.strerror(number))
        return original(*args, **kwargs)

    setattr(owner, name, wrapped)


def torn_from(point: str, args: tuple) -> int:
    """Size of the file that a call appends to or makes."""
    path = TORN[point](*args) if point in TORN else None
    return path.stat().st_size if path and path.exists() else 0


def tell(wrong: str, **facts: object) -> None:
    print(json.dumps(facts | {"wrong": wrong}), flush=True)


def whole(setting: Setting, num_ranks: int, redo: bool = False) -> tuple[dict[str, bytes], dict[str, int], float]:
    """Files of an uninterrupted run, calls of each point on its last rank, and its seconds."""
    arguments = setting.arguments(f"{'redone' if redo else 'whole'}-{num_ranks}", redo)
    output, start = output_of(arguments), time.monotonic()
    counts = Path(f"{output}.counts")
    assert not any(launch(arguments, num_ranks, num_ranks - 1, lambda: counted(counts)))
    return result_files(output), json.loads(counts.read_text()), time.monotonic() - start


def kill_at_points(setting: Setting, moments: int, redo: bool) -> None:
    """Each point at its middle call: before it, after it and, where it writes, in its midst; or at one of these."""
    reference, counts, _ = whole(setting, 1, redo)
    for place, (point, number) in enumerate(counts.items()):
        possible = MOMENTS[: 3 if point in TORN else 2]
        for moment in possible if moments > 1 else [possible[2 if point in TORN else place % 2]]:
            call = (number + 1) // 2
            arguments = setting.arguments(f"{point}-{moment}".replace(" ", "-"), redo)
            [status] = launch(arguments, before=lambda p=point, m=moment, c=call: killed_at(p, m, c))
            killed = os.WIFSIGNALED(status)
            wrong = what_is_wrong(arguments, 1, reference) if killed else "was not killed"
            tell(wrong, point=point, moment=moment, call=call, of=number)
            shutil.rmtree(output_of(arguments), ignore_errors=True)


def refuse_at_points(setting: Setting, kinds: int) -> None:
    """Each point that writes at its middle call, on either rank: both end, one says why, and the run goes on."""
    reference, counts, _ = whole(setting, 2)
    for place, point in enumerate(WRITES):
        for who in (0, 1):
            for number in ERRORS if kinds > 1 else [ERRORS[(place + who) % len(ERRORS)]]:
                arguments = setting.arguments(f"{point}-{who}-{number}".replace(" ", "-"))
                call = (counts[point] + 1) // 2
                statuses = launch(arguments, 2, who, lambda p=point, n=number, c=call: refused_at(p, n, c))
                told, wrong = Path(f"{output_of(arguments)}.error"), ""
                if not all(statuses):
                    wrong = "a rank went on"
                elif not told.exists() or not any(told.read_text().endswith(advice) for advice in ADVICE):
                    wrong = "no line that says what to do"
                told.unlink(missing_ok=True)
                wrong = wrong or what_is_wrong(arguments, 2, reference)
                tell(wrong, point=point, who=who, error=errno.errorcode[number], call=call)
                shutil.rmtree(output_of(arguments), ignore_errors=True)


def kill_at_random(setting: Setting, number: int) -> None:
    """Three of four on one rank, one of five in a redo; of each, half at a random call, half at a random time."""
    draw = random.Random(0)
    wholes = {kind: whole(setting, *kind) for kind in ((1, False), (2, False), (1, True), (2, True))}
    trial, num_killed = -1, 0
    while num_killed < number:  # a run may end before its time to be killed
        trial += 1
        num_ranks, redo = 2 if trial % 4 == 3 else 1, trial % 5 == 4
        reference, counts, seconds = wholes[num_ranks, redo]
        arguments, who = setting.arguments(f"random-{trial}", redo), draw.randrange(num_ranks)
        facts = {"ranks": num_ranks, "who": who, "redo": redo}
        if trial // 4 % 2:
            facts |= {"point": "time", "seconds": round(draw.uniform(0.01, seconds), 3)}
            statuses = launch(arguments, num_ranks, who, seconds=facts["seconds"])
        else:
            point = draw.choice([name for name, calls in counts.items() if calls])
            moment, call = draw.choice(MOMENTS[: 3 if point in TORN else 2]), draw.randint(1, counts[point])
            facts |= {"point": point, "moment": moment, "call": call}
            statuses = launch(arguments, num_ranks, who, lambda p=point, m=moment, c=call: killed_at(p, m, c))
        killed = os.WIFSIGNALED(statuses[who])
        num_killed += killed
        tell(what_is_wrong(arguments, num_ranks, reference), **facts, killed=killed)
        shutil.rmtree(output_of(arguments), ignore_errors=True)


def cut_power(setting: Setting, every: int) -> None:
    """Record a run's disk, looking at it after each commit, then go on from what each sync has left."""
    reference, _, _ = whole(setting, 1)
    root, states = setting.folder / "disk", setting.folder / "states"
    root.mkdir()
    commits = setting.folder / "commits"

    def record() -> None:
        disk, commit = Disk(root, states), ledger.commit

        def commit_and_look(output: Path, *args: object, **facts: object) -> dict:
            line = commit(output, *args, **facts)
            with open(commits, "a") as file:
                file.write(f"{', '.join(disk.lost(output))}\n")
            return line

        ledger.commit = commit_and_look

    assert not any(launch(setting.arguments("disk/out"), before=record))
    for number, lost in enumerate(commits.read_text().splitlines()):
        tell(f"lost after a commit: {lost}" if lost else "", commit=number)
    seen = set()
    for number, state in enumerate(sorted(states.iterdir())):
        content = tuple(sorted((name, value) for name, value in result_files(state).items()))
        if content in seen or number % every:
            continue
        seen.add(content)
        arguments = setting.arguments(f"states/{state.name}/out")
        tell(what_is_wrong(arguments, 1, reference), state=state.name)


def main() -> None:
    torch.set_num_threads(1)
    what, folder, *numbers = sys.argv[1:]
    setting = Setting(Path(folder))
    if what in ("points", "redo"):
        kill_at_points(setting, int(numbers[0]), what == "redo")
    elif what == "random":
        kill_at_random(setting, int(numbers[0]))
    elif what == "errors":
        refuse_at_points(setting, int(numbers[0]))
    elif what == "disk":
        cut_power(setting, int(numbers[0]))


if __name__ == "__main__":
    main()
