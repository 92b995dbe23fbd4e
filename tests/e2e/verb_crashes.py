"""Exports and tunings that are killed, ended by a signal, or meet a full disk; `test_verb_crashes.py` starts it.

Each attempt is a fork of one process that has imported everything. After it the same command has to give what one that
nothing has disturbed gives.

    python tests/e2e/verb_crashes.py FOLDER EVERY WHAT...     each EVERY-th call of each point; WHAT: tune, or a format

Prints a JSON line for each crash: what was done, and what is wrong after the same command went on (nothing: "").
"""

import errno
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch

import tiny
from crashes import die, tell
from runs import ONE_RANK, result_files, run_quantize
from shardq.cli import COMMANDS, parse
from shardq.errors import Interrupted, ShardQError
from shardq.export import contents
from shardq.formats import tensor_file
from shardq.liveness.interrupts import interruptible
from shardq.rundir import ledger
from test_gguf import add_bpe

POINTS = {  # name: where the function is looked up when it is called
    "sync": (os, "fsync"),
    "rename": (os, "replace"),
    "delete": (os, "unlink"),
    "make folder": (os, "mkdir"),
    "write tensors": (tensor_file, "save_file"),
    "ledger line": (ledger, "append_line"),
    "record": (contents, "write_json"),
}
WRITES = ("sync", "rename", "make folder")  # points at which the system may refuse


def killed() -> None:
    die()


def ended() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


KINDS = {"killed before": (killed, True), "killed after": (killed, False), "ended": (ended, True), "full": (full, True)}


def struck_at(point: str, call: int, kind: str) -> None:
    """Have this process struck at a call of a function, counted from 1; a full disk stays full."""
    strike, is_before = KINDS[kind]
    owner, name = POINTS[point]
    original, calls = getattr(owner, name), []

    def wrapped(*args: object, **kwargs: object) -> object:
        calls.append(None)
        strikes = len(calls) >= call if strike is full else len(calls) == call
        if strikes and is_before:
            strike()
        result = original(*args, **kwargs)
        if strikes and not is_before:
            strike()
        return result

    setattr(owner, name, wrapped)


def counted(counts: dict[str, int]) -> None:
    """Count the calls of each point."""

    def count(point: str, original: Callable) -> Callable:
        def wrapped(*args: object, **kwargs: object) -> object:
            counts[point] += 1
            return original(*args, **kwargs)

        return wrapped

    for point, (owner, name) in POINTS.items():
        setattr(owner, name, count(point, getattr(owner, name)))


def attempt(arguments: list[str], before: Callable[[], None] = lambda: None, told: Path | None = None) -> str:
    """Run a command in a fork: nothing if it came to its end, else what ended it.

    Args:
        told: the file that gets the number of calls of each point.
    """
    read, write = os.pipe()
    pid = os.fork()
    if pid:
        os.close(write)
        with os.fdopen(read) as pipe:
            message = pipe.read()
        status = os.waitpid(pid, 0)[1]
        return message if os.WIFEXITED(status) else "killed"
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    message, counts = "no message", dict.fromkeys(POINTS, 0)
    if told:
        counted(counts)
    before()
    try:
        with interruptible("the same command goes on"):
            COMMANDS[arguments[0]].run(parse(arguments[0], arguments[1:]), ONE_RANK)
        message = ""
    except (ShardQError, Interrupted) as error:
        message = str(error)
    finally:
        if told:
            told.write_text(json.dumps(counts))
        os.write(write, message.encode())
        os._exit(0)


def command(what: str, folder: Path, run: Path, output: Path) -> list[str]:
    if what != "tune":
        return ["export", str(run), "--format", what, "--output", str(output)]
    return ["tune", str(run), "--model", str(folder / "model"), "--output", str(output), "--tune.steps", "5",
            "--tune.batch_size", "1", "--tune.precision", "float32"]  # fmt: skip


def sweep(folder: Path, what: str, every: int) -> None:
    run, counts = folder / "run", folder / f"{what}.counts"
    assert attempt(command(what, folder, run, folder / f"{what}-whole"), told=counts) == ""
    reference, number = result_files(folder / f"{what}-whole"), -1
    for point, calls in json.loads(counts.read_text()).items():
        for call in range(1, calls + 1):
            for kind in KINDS:
                number += 1
                if number % every or (kind == "full" and point not in WRITES):
                    continue
                output = folder / f"{what}-{number}"
                arguments = command(what, folder, run, output)
                came = attempt(arguments, lambda p=point, c=call, k=kind: struck_at(p, c, k))
                wrong = attempt(arguments)
                found = result_files(output)
                differing = [name for name in found.keys() | reference if found.get(name) != reference.get(name)]
                tell(wrong or ", ".join(sorted(differing)), what=what, point=point, call=call, kind=kind, came=came)
                shutil.rmtree(output)


def main() -> None:
    torch.set_num_threads(1)
    folder, every, *whats = sys.argv[1:]
    folder = Path(folder)
    model = tiny.save_llama(folder / "model", num_blocks=2, hidden=32, num_key_value_heads=4)  # what GPTQ can hold
    add_bpe(model)
    tokens = tiny.save_tokens(folder / "tokens.safetensors", num=4, length=16)
    run_quantize(model, tokens, folder / "run", "--calib.samples", 4, "--calib.sequence_length", 16, "--quant.method",
                 "rtn")  # fmt: skip
    for what in whats:
        sweep(folder, what, int(every))


if __name__ == "__main__":
    main()
