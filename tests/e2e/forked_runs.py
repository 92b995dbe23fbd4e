"""Runs of a tiny model, each in forks of one process that has imported everything: a fraction of a second each."""

import os
import shutil
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import forked
import tiny
from runs import quantize_arguments, result_files
from shardq.cli import parse
from shardq.commands.quantize import quantize
from shardq.errors import ShardQError
from shardq.parallel.ranks import started


def fork_run(arguments: list[str], rank: int, num_ranks: int, port: int, before: Callable[[], None]) -> int:
    """Quantize in a fork of this process; gives its process id. Exit code 0, or 1 with the error in `OUT.error`."""
    pid = os.fork()
    if pid:
        return pid
    os.environ.update(forked.environment_of(rank, num_ranks, port))
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


class Setting:
    """A tiny model, its tokens, and a finished run."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.model = tiny.save_llama(folder / "model", num_blocks=2, hidden=32)
        self.tokens = tiny.save_tokens(folder / "tokens.safetensors", num=4, length=16)
        assert not any(launch(self.arguments("finished")))

    def arguments(self, name: str, redo: bool = False) -> list[str]:
        """A run's; or, in a folder that holds a finished one, of a redo with other settings."""
        if redo:
            shutil.copytree(self.folder / "finished", self.folder / name)
        more = ["--calib.samples", 4, "--calib.sequence_length", 16, "--optimize.iterations", 2 if redo else 3]
        more += ["--checkpoint.every_iterations", 1, "--export.checkpoint", "packed", "--export.formats", "hf"]
        more += ["--redo", 0] if redo else []
        return quantize_arguments(self.model, self.tokens, self.folder / name, *more)
