"""A run that is asked to end does so soon, on all ranks, with one line; the same command goes on."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import tiny
from runs import LAUNCH, committed, last_json, quantize_arguments, ranks_of, result_files, run_quantize
from shardq.errors import Stopped
from shardq.rundir.folder import RunFolder

LIMIT_SECONDS = 10.0


def start(num_ranks: int, arguments: list[str]) -> subprocess.Popen:
    """Start a run under torchrun, in a process group of its own as a terminal would."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks),
               str(LAUNCH / "quantize.py"), *arguments]  # fmt: skip
    return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, start_new_session=True)  # fmt: skip


def wait_for_block(process: subprocess.Popen, output: Path, num_blocks: int) -> None:
    deadline = time.monotonic() + tiny.LAUNCH_TIMEOUT_SECONDS
    while committed(output) < num_blocks:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.005)


def own_lines(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if line.startswith("shardq:")]


@pytest.mark.parametrize(
    "how",
    [
        "SIGTERM to the launcher",
        pytest.param("SIGINT to all", marks=pytest.mark.slow),
        pytest.param("SIGTERM to one rank", marks=pytest.mark.slow),
    ],
)
def test_interrupted_run_ends_soon_with_one_line_and_goes_on(llama, token_file, two_ranks, tmp_path, how):
    output, number = tmp_path / "out", getattr(signal, how.split()[0])
    arguments = quantize_arguments(llama, token_file, output)
    process = start(2, arguments)
    wait_for_block(process, output, 1)
    ranks, sent = ranks_of(process.pid), time.monotonic()
    if how.endswith("all"):  # what Ctrl-C in a terminal does
        os.killpg(process.pid, number)
    else:
        os.kill(ranks[1] if how.endswith("rank") else process.pid, number)
    _, stderr = process.communicate(timeout=60)
    assert time.monotonic() - sent < LIMIT_SECONDS and process.returncode != 0
    assert not any(Path(f"/proc/{rank}/fd/0").exists() for rank in ranks)
    [line] = own_lines(stderr)
    assert re.fullmatch(
        rf"shardq: (\[rank 0\] rank 1 was )?ended by {number.name}; the same command goes on after the blocks that are "
        "finished", line,
    )  # fmt: skip
    assert not list(output.rglob("*.partial")) and not (output / "lock").exists()
    finished = tiny.torchrun(2, [LAUNCH / "quantize.py", *arguments])
    assert finished.returncode == 0, finished.stderr
    assert "resuming" in finished.stdout and "was killed" not in finished.stdout
    assert result_files(output) == result_files(two_ranks[0])


HANGING = """
import ctypes, signal, sys, threading, time
from shardq.liveness import interrupts

def deadlock():
    mutex = ctypes.create_string_buffer(64)
    for _ in range(2):
        ctypes.CDLL(None).pthread_mutex_lock(mutex)

interrupts.GRACE_SECONDS = 1.0
with interrupts.interruptible("go on"):
    try:
        print("ready", flush=True)
        threading.Event().wait() if sys.argv[1] == "cleaning up" else deadlock()
    except KeyboardInterrupt:
        time.sleep(60)
"""


@pytest.mark.parametrize("what", ["cleaning up", "in the middle of a call into C"])
def test_main_thread_that_does_not_come_to_its_end_is_ended(what):
    command = [sys.executable, "-c", HANGING, what]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.terminate()
        try:
            _, stderr = process.communicate(timeout=20)
        finally:
            process.kill()
    assert (process.returncode, stderr) == (128 + signal.SIGTERM, "shardq: ended by SIGTERM; go on\n")


LOADING = """
import os, signal, sys, time
from shardq.background import lookahead
from shardq.errors import Interrupted
from shardq.liveness.interrupts import interruptible

def compute():
    loaded = lookahead(lambda key: key, range(9))
    next(loaded)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)

try:
    with interruptible("go on"):
        compute()
except Interrupted:
    print("in order", flush=True)
    os._exit(0)
"""


def test_thread_that_waits_for_more_to_load_does_not_hold_up_the_end():
    """What loads ahead is not closed while the frame that uses it is kept for a traceback."""
    ended = subprocess.run([sys.executable, "-c", LOADING], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (0, "in order\n"), ended.stderr


WRITING = """
import os, signal, sys, threading, time
from dataclasses import replace
from pathlib import Path
from shardq import cli
from shardq.background import THREADS, behind
from shardq.files import write_whole

def write(path):
    write_whole(path, lambda aside: (aside.write_text("half"), time.sleep(1), aside.write_text("whole")))

def start(thread):
    plain_start(thread)
    if thread.name.startswith(THREADS):
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        os.kill(os.getpid(), signal.SIGTERM)

def work(config, ranks):
    with behind(write) as write_later:
        write_later(Path(sys.argv[1]) / "file")

plain_start, threading.Thread.start = threading.Thread.start, start
cli.COMMANDS["verify"] = replace(cli.COMMANDS["verify"], run=work)
cli.run_command("verify", [sys.argv[1]])
"""


def test_file_being_written_is_finished_when_the_signal_comes_as_its_thread_starts(tmp_path):
    """The thread runs by then, but its executor does not know it yet, and so does not wait for it.

    A second signal changes nothing.
    """
    ended = subprocess.run([sys.executable, "-c", WRITING, tmp_path], capture_output=True, text=True, timeout=60)
    [line] = own_lines(ended.stderr)
    assert ended.returncode == 128 + signal.SIGTERM and line.startswith("shardq: ended by SIGTERM")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"file": "whole"}


@pytest.mark.slow
@pytest.mark.parametrize("how", ["file", "signal"])
def test_run_stops_after_the_block_at_hand_on_all_ranks(llama, token_file, two_ranks, tmp_path, how):
    output = tmp_path / "out"
    arguments = quantize_arguments(llama, token_file, output)
    process = start(2, arguments)
    wait_for_block(process, output, 1)
    if how == "file":
        RunFolder(output).stop.touch()
    else:
        os.kill(ranks_of(process.pid)[1], signal.SIGUSR1)
    _, stderr = process.communicate(timeout=60)
    [line] = own_lines(stderr)
    done = committed(output)
    assert 1 <= done <= 2
    assert line == f"shardq: {output}: stopped as asked, {done} of 3 blocks are done; the same command goes on"
    assert process.returncode != 0 and not RunFolder(output).stop.exists()
    finished = tiny.torchrun(2, [LAUNCH / "quantize.py", *arguments])
    assert last_json(finished.stdout)["blocks"] == 3
    assert result_files(output) == result_files(two_ranks[0])


@pytest.mark.parametrize("how", ["file", "signal"])
def test_run_stops_after_each_block_in_which_it_is_asked_to(llama, token_file, tmp_path, how):
    """Asked in the last block, there is nothing to stop; a file from before the run stops nothing, either."""
    output = tmp_path / "out"

    def ask(*_: object) -> None:
        RunFolder(output).stop.touch() if how == "file" else os.kill(os.getpid(), signal.SIGUSR1)

    for done in (1, 2):
        with pytest.raises(Stopped, match=f"stopped as asked, {done} of 3 blocks are done"):
            run_quantize(llama, token_file, output, "--quant.method", "rtn", on_commit=ask)
        assert committed(output) == done and not RunFolder(output).stop.exists()
        RunFolder(output).stop.touch()
    run_quantize(llama, token_file, output, "--quant.method", "rtn", on_commit=ask)
    assert committed(output) == 4 and not RunFolder(output).stop.exists()
