"""Runs that are killed at chosen calls, and a model of the disk that they leave; `test_crashes.py` and people start it.

Everything is imported once; each run is a fork, so that a run of a small model takes a fraction of a second.

    python tests/e2e/crashes.py points FOLDER 1         each point of one rank, at 1 or at all of its moments
    python tests/e2e/crashes.py random FOLDER NUMBER    that many kills at random points and times, on 1 and 2 ranks
    python tests/e2e/crashes.py disk FOLDER EVERY       what a power cut leaves after every EVERY-th sync

Prints a JSON line for each crash: what was done, and what is wrong after the same command went on (nothing: "").
"""

import json
import os
import random
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import tiny
from runs import quantize_arguments, result_files
from shardq.cache.store import DiskStore
from shardq.cli import parse
from shardq.errors import ShardQError
from shardq.formats import tensor_file
from shardq.model import weights
from shardq.optimize.stepper import LocalStepper
from shardq.parallel.ranks import started
from shardq.pipeline import ledger, run, training_checkpoint
from shardq.pipeline.run import quantize

POINTS = {  # name: where the function is looked up when it is called
    "sync": (os, "fsync"),
    "rename": (os, "replace"),
    "delete": (os, "unlink"),
    "make folder": (os, "mkdir"),
    "delete folder": (os, "rmdir"),
    "write tensors": (tensor_file, "save_file"),
    "ledger line": (ledger, "append_line"),
    "commit": (ledger, "commit"),
    "block files": (run, "write_block_files"),
    "barrier": (run, "barrier"),
    "step": (LocalStepper, "step"),
    "save checkpoint": (training_checkpoint, "save"),
    "load checkpoint": (training_checkpoint, "load"),
    "remove checkpoint": (training_checkpoint, "remove"),
    "read activations": (DiskStore, "read"),
    "write activations": (DiskStore, "write"),
    "drop activations": (DiskStore, "drop"),
    "read weights": (weights, "read_weight"),
    "finish": (run, "write_run_files"),
    "delete cache": (shutil, "rmtree"),
}
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
        result = original(*args, **kwargs)
        if moment == "within":
            path = TORN[point](*args)
            os.truncate(path, (size + path.stat().st_size) // 2)
        die()
        return result

    setattr(owner, name, wrapped)


def torn_from(point: str, args: tuple) -> int:
    """Size of the file that a call appends to or makes."""
    path = TORN[point](*args) if point in TORN else None
    return path.stat().st_size if path and path.exists() else 0


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
    done = run._say_what_is_where
    run._say_what_is_where = lambda *args: (counts.write_text(json.dumps(numbers)), done(*args))


def fork_run(arguments: list[str], rank: int, num_ranks: int, port: int, before: Callable[[], None]) -> int:
    """Quantize in a fork of this process; gives its process id. Exit code 0, or 1 with the error in `OUT.error`."""
    pid = os.fork()
    if pid:
        return pid
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks,
             "MASTER_ADDR": "localhost", "MASTER_PORT": port}  # fmt: skip
    os.environ.update({name: str(value) for name, value in place.items()})
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    before()
    code = 1
    try:
        with started("cpu") as ranks:
            quantize(parse("quantize", arguments), ranks)
        code = 0
    except ShardQError as error:
        Path(f"{output_of(arguments)}.error").write_text(str(error))
    finally:
        os._exit(code)


def output_of(arguments: list[str]) -> Path:
    return Path(arguments[arguments.index("--output") + 1])


def launch(
    arguments: list[str], num_ranks: int = 1, who: int = 0, before: Callable = lambda: None, seconds: float = 0
) -> list[int]:
    """Run all ranks, one of which is prepared by `before`, or killed after some seconds; their wait statuses."""
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    pids = [
        fork_run(arguments, rank, num_ranks, port, before if rank == who else lambda: None) for rank in range(num_ranks)
    ]
    if seconds:
        time.sleep(seconds)
        os.kill(pids[who], signal.SIGKILL)
    return [os.waitpid(pid, 0)[1] for pid in pids]


def what_is_wrong(arguments: list[str], num_ranks: int, reference: dict[str, bytes]) -> str:
    """Go on; what keeps the result from being the reference's, file by file, or nothing."""
    if any(launch(arguments, num_ranks)):
        error = Path(f"{output_of(arguments)}.error")
        return f"does not go on: {error.read_text() if error.exists() else 'no message'}"
    found = result_files(output_of(arguments))
    return ", ".join(sorted(name for name in found.keys() | reference.keys() if found.get(name) != reference.get(name)))


def tell(wrong: str, **facts: object) -> None:
    print(json.dumps(facts | {"wrong": wrong}), flush=True)


class Setting:
    """A tiny model and its tokens, and finished runs to compare with."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.model = tiny.save_llama(folder / "model", num_blocks=2, hidden=32)
        self.tokens = tiny.save_tokens(folder / "tokens.safetensors", num=4, length=16)

    def arguments(self, name: str) -> list[str]:
        more = ["--calib.samples", 4, "--calib.sequence_length", 16, "--optimize.iterations", 3,
                "--checkpoint.every_iterations", 1]  # fmt: skip
        return quantize_arguments(self.model, self.tokens, self.folder / name, *more)

    def finished(self, num_ranks: int) -> tuple[dict[str, bytes], dict[str, int], float]:
        """Files of an uninterrupted run, calls of each point on its last rank, and its seconds."""
        name, counts, start = f"whole-{num_ranks}", self.folder / f"counts-{num_ranks}", time.monotonic()
        assert not any(launch(self.arguments(name), num_ranks, num_ranks - 1, lambda: counted(counts)))
        return result_files(self.folder / name), json.loads(counts.read_text()), time.monotonic() - start


def kill_at_points(setting: Setting, moments: int) -> None:
    """Each point at its middle call: before it, after it and, where it writes, in its midst; or at one of these."""
    reference, counts, _ = setting.finished(1)
    for place, (point, number) in enumerate(counts.items()):
        possible = MOMENTS[: 3 if point in TORN else 2]
        for moment in possible if moments > 1 else [possible[2 if point in TORN else place % 2]]:
            call = (number + 1) // 2
            arguments = setting.arguments(f"{point}-{moment}".replace(" ", "-"))
            [status] = launch(arguments, before=lambda p=point, m=moment, c=call: killed_at(p, m, c))
            killed = os.WIFSIGNALED(status)
            wrong = what_is_wrong(arguments, 1, reference) if killed else "was not killed"
            tell(wrong, point=point, moment=moment, call=call, of=number)
            shutil.rmtree(output_of(arguments), ignore_errors=True)


def kill_at_random(setting: Setting, number: int) -> None:
    """Three of four on one rank; of each, half at a random call of a random point, half at a random time."""
    draw = random.Random(0)
    whole = {num_ranks: setting.finished(num_ranks) for num_ranks in (1, 2)}
    trial, num_killed = -1, 0
    while num_killed < number:  # a run may end before its time to be killed
        trial += 1
        num_ranks = 2 if trial % 4 == 3 else 1
        reference, counts, seconds = whole[num_ranks]
        arguments, who = setting.arguments(f"random-{trial}"), draw.randrange(num_ranks)
        if trial // 4 % 2:
            facts = {"ranks": num_ranks, "who": who, "point": "time", "seconds": round(draw.uniform(0.01, seconds), 3)}
            statuses = launch(arguments, num_ranks, who, seconds=facts["seconds"])
        else:
            point = draw.choice([name for name, calls in counts.items() if calls])
            moment, call = draw.choice(MOMENTS[: 3 if point in TORN else 2]), draw.randint(1, counts[point])
            facts = {"ranks": num_ranks, "who": who, "point": point, "moment": moment, "call": call}
            statuses = launch(arguments, num_ranks, who, lambda p=point, m=moment, c=call: killed_at(p, m, c))
        killed = os.WIFSIGNALED(statuses[who])
        num_killed += killed
        tell(what_is_wrong(arguments, num_ranks, reference), **facts, killed=killed)
        shutil.rmtree(output_of(arguments), ignore_errors=True)


class Disk:
    """What of a folder would survive a power cut, told from the calls that sync, rename and delete.

    After each sync two states are kept: `synced`, with nothing that was not synced; and `ordered`, where names reach
    the disk at once but a file's bytes only when it is synced, as a journal of names alone may leave them.
    """

    def __init__(self, root: Path, states: Path):
        self.root, self.states, self.number = root, states, 0
        self.bytes: dict[tuple[int, int], bytes] = {}  # by inode and how often its number was used before
        self.uses: dict[int, int] = {}
        self.names: dict[Path, dict[str, tuple[int, int]]] = {root: {}}
        for owner, name, note in (
            (os, "fsync", self.sync), (os, "unlink", self.forget), (os, "replace", self.forget_target)
        ):  # fmt: skip
            self.wrap(owner, name, note)

    def wrap(self, owner: object, name: str, note: Callable) -> None:
        original = getattr(owner, name)
        setattr(owner, name, lambda *args, **kwargs: note(original, *args, **kwargs))

    def key(self, path: Path) -> tuple[int, int]:
        inode = path.stat().st_ino
        return inode, self.uses.get(inode, 0)

    def forget(self, original: Callable, path: str | Path, **options: object) -> None:
        inode = os.stat(path).st_ino if os.path.exists(path) else None
        original(path, **options)
        self.uses[inode] = self.uses.get(inode, 0) + 1

    def forget_target(self, original: Callable, source: str | Path, target: str | Path) -> None:
        if os.path.exists(target):
            inode = os.stat(target).st_ino
            self.uses[inode] = self.uses.get(inode, 0) + 1
        original(source, target)

    def sync(self, original: Callable, descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path.is_relative_to(self.root):
            self.keep("ordered", self.live(self.root))  # a cut just before this sync
        original(descriptor)
        if path.is_relative_to(self.root):
            if path.is_dir():
                self.names[path] = {entry.name: self.key(entry) for entry in path.iterdir()}
            else:
                self.bytes[self.key(path)] = path.read_bytes()
            self.keep("synced", self.durable(self.root))

    def durable(self, folder: Path) -> dict[str, bytes | None]:
        """Files by path, and folders without bytes, that are there whatever was not synced."""
        found: dict[str, bytes | None] = {}
        for name, key in self.names.get(folder, {}).items():
            path = folder / name
            is_folder = path in self.names or path.is_dir()
            found[str(path.relative_to(self.root))] = None if is_folder else self.bytes.get(key, b"")
            if is_folder:
                found |= self.durable(path)
        return found

    def live(self, folder: Path) -> dict[str, bytes | None]:
        """Every name that there is now, with the bytes that were synced."""
        return {
            str(path.relative_to(self.root)): None if path.is_dir() else self.bytes.get(self.key(path), b"")
            for path in folder.rglob("*")
        }

    def keep(self, kind: str, state: dict[str, bytes | None]) -> None:
        folder = self.states / f"{self.number:05d}-{kind}"
        self.number += 1
        for name, content in sorted(state.items()):
            path = folder / name
            path.mkdir(parents=True, exist_ok=True) if content is None else path.parent.mkdir(
                parents=True, exist_ok=True
            )
            if content is not None:
                path.write_bytes(content)


def cut_power(setting: Setting, every: int) -> None:
    """Record a run's disk, then go on from what each sync has left."""
    reference, _, _ = setting.finished(1)
    root, states = setting.folder / "disk", setting.folder / "states"
    root.mkdir()
    assert not any(launch(setting.arguments("disk/out"), before=lambda: Disk(root, states)))
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
    if what == "points":
        kill_at_points(setting, int(numbers[0]))
    elif what == "random":
        kill_at_random(setting, int(numbers[0]))
    elif what == "disk":
        cut_power(setting, int(numbers[0]))


if __name__ == "__main__":
    main()
