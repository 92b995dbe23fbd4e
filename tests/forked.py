"""Programs in forks of one process that has imported everything: a launch takes no seconds of imports.

The ranks meet as under torchrun, by the same environment. What torchrun itself does is tested with `tiny.torchrun`.
"""

import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

IMPORTED = (
    "shardq.commands.quantize", "shardq.commands.tune", "shardq.commands.evaluate", "shardq.commands.export",
    "shardq.commands.verify", "shardq.parallel.allreduce", "shardq.parallel.rows", "transformers.modeling_utils",
    "transformers.models.llama.modeling_llama", "datasets",
)  # fmt: skip
TIMEOUT_SECONDS = 1800


class Launch:
    """Ranks at work, by their process ids; one launch at a time in a process.

    Attributes:
        codes: with which they ended, once `wait` has returned.
    """

    codes: list[int]

    def __init__(self, places: list[dict[str, str]], arguments: list[str], ends_others: bool = True):
        self.arguments = arguments
        self._told = tempfile.TemporaryDirectory()
        self._server = _server()
        asked = {"arguments": arguments, "environment": dict(os.environ), "places": places, "told": self._told.name,
                 "ends others": ends_others}  # fmt: skip
        self._server.stdin.write(json.dumps(asked) + "\n")
        self._server.stdin.flush()
        self.pids: list[int] = json.loads(self._server.stdout.readline())

    def is_over(self, seconds: float = 0) -> bool:
        """Whether every rank has ended, or does so within some seconds."""
        return bool(select.select([self._server.stdout], [], [], seconds)[0])

    def wait(self, seconds: float = TIMEOUT_SECONDS) -> subprocess.CompletedProcess:
        """The code of the first rank, in their order, that failed, or 0, and what all ranks printed."""
        is_over = self.is_over(seconds)
        if not is_over:
            for pid in self.pids:
                os.kill(pid, signal.SIGKILL)
        self.codes = json.loads(self._server.stdout.readline())
        stdout, stderr = (Path(self._told.name, name).read_text() for name in ("stdout", "stderr"))
        self._told.cleanup()
        assert is_over, f"still running after {seconds} s: {self.arguments}\n{stderr}"
        return subprocess.CompletedProcess(self.arguments, next(filter(None, self.codes), 0), stdout, stderr)


def environment_of(rank: int, num_ranks: int, port: int) -> dict[str, str]:
    """What torchrun sets for a rank of some on this host."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks,
             "MASTER_ADDR": "localhost", "MASTER_PORT": port}  # fmt: skip
    return {name: str(value) for name, value in place.items()}


def start(num_ranks: int, program: list[str | Path], *, ends_others: bool = True, **env: object) -> Launch:
    """Start a program, a script and its arguments, on several ranks.

    Args:
        ends_others: whether all ranks are ended where one fails, as by torchrun.
        env: environment variables to set beside the present ones.
    """
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    own = {"OMP_NUM_THREADS": "1"} | {name: str(value) for name, value in env.items()}
    places = [environment_of(rank, num_ranks, port) | own for rank in range(num_ranks)]
    return Launch(places, list(map(str, program)), ends_others)


def ranks(num_ranks: int, program: list[str | Path], **env: object) -> subprocess.CompletedProcess:
    """As `start`, to the end; text output, any exit code."""
    return start(num_ranks, program, **env).wait()


def told_by(script: str | Path, *arguments: object) -> list[dict]:
    """Run one of the tests' own programs, which tells a JSON object a line, to its end in a process of its own."""
    done = Launch([{"OMP_NUM_THREADS": "1"}], [str(script), *map(str, arguments)]).wait()
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@cache
def _server() -> subprocess.Popen:
    """The process that forks; it ends with this one, whose end it sees on its standard input."""
    return subprocess.Popen([sys.executable, __file__], env=os.environ | {"OMP_NUM_THREADS": "1"},
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # fmt: skip


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints as it is imported is no answer
    for name in IMPORTED:
        importlib.import_module(name)
    for line in sys.stdin:
        asked = json.loads(line)
        pids = []
        for place in asked["places"]:
            pid = os.fork()
            if pid == 0:
                answers.close()
                _run(asked["arguments"], asked["environment"] | place, Path(asked["told"]))
            pids.append(pid)
        print(json.dumps(pids), file=answers, flush=True)
        codes = _codes(set(pids), asked["ends others"])
        print(json.dumps([codes[pid] for pid in pids]), file=answers, flush=True)


def _codes(running: set[int], ends_others: bool) -> dict[int, int]:
    """With which each process has ended, once all have."""
    codes = {}
    while running:
        pid, status = os.wait()
        running.discard(pid)
        codes[pid] = os.waitstatus_to_exitcode(status)
        if codes[pid] and ends_others:
            for other in running:
                os.kill(other, signal.SIGTERM)
            ends_others = False
    return codes


def _run(arguments: list[str], environment: dict[str, str], told: Path) -> None:
    """Be the program, as the interpreter runs one, and end."""
    os.environ.clear()
    os.environ.update(environment)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(told / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.argv[:], sys.path[0] = arguments, str(Path(arguments[0]).parent)
    code = 1
    try:
        runpy.run_path(arguments[0], run_name="__main__")
        code = 0
    except SystemExit as error:
        code = error.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
