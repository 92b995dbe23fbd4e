"""Runs of the Python API: several calls in one process, the bytes of the command line, processes that go on."""

import logging
import signal
import sys
import threading
from pathlib import Path

import pytest
import torch.distributed as dist

import shardq
import tiny
from runs import result_files, run_quantize
from shardq.errors import ResumeError
from shardq.rundir.folder import RunFolder
from shardq.rundir.ledger import commit

SHORT = {
    "calib": {"samples": 8, "sequence_length": 64},
    "quant": {"group_size": -1},
    "export": {"checkpoint": "plain"},
    "optimize": {
        "preset": "aimet", "iterations": 24, "batch_size": 2, "weight_lr": 3e-3, "compile": "off",
        "precision": "float32", "last_block": "predictions",
    },
}  # fmt: skip
"""The options of `quantize_arguments`."""


def short(tokens: Path, **more: object) -> dict:
    """Options of a short run on a token file."""
    return SHORT | {"calib": SHORT["calib"] | {"dataset": tokens}} | more


def state_of_process() -> tuple:
    """What a call must leave as it finds it."""
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    return handlers, sys.excepthook, logging.getLogger("transformers").level, dist.is_initialized()


@pytest.fixture(scope="module")
def by_command(llama: Path, token_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output of the command line's function. Read only."""
    output = tmp_path_factory.mktemp("command") / "out"
    run_quantize(llama, token_file, output)
    return output


def test_calls_one_after_another_give_the_command_lines_bytes_and_leave_the_process_as_it_was(
    llama, token_file, by_command, tmp_path, capfd
):
    before = state_of_process()
    summaries = [shardq.quantize(llama, output=tmp_path / name, **short(token_file)) for name in ("one", "two")]
    assert result_files(tmp_path / "one") == result_files(tmp_path / "two") == result_files(by_command)
    assert summaries[0]["blocks"] == 3 and summaries[0]["loss_after"] == summaries[1]["loss_after"]
    run = shardq.load_run(tmp_path / "one")
    assert run.is_finished and run.blocks[1].name == "model.layers.1" and len(run.blocks[1].grids) == 7
    losses = [block.facts["loss_after"] for block in run.blocks if "loss_after" in block.facts]
    assert summaries[0]["loss_after"] == sum(losses) / len(losses)
    assert all(block.seconds["train"] > 0 for block in run.blocks)
    text = {"dataset": token_file, "sequence_length": 64}
    measured = [shardq.evaluate(tmp_path / name, eval=text)["perplexity"] for name in ("one", "two")]
    assert measured[0] == measured[1] > 1
    exported = shardq.export(tmp_path / "one", format="gptq")
    assert shardq.verify(tmp_path / "one")["linears"] == 21
    assert shardq.verify(exported["output"])["files"] > 3
    tuned = shardq.tune(tmp_path / "two", model=llama, tune={"steps": 1})
    assert tuned["steps"] == 1 and Path(tuned["output"]).name == "two-tuned"
    assert state_of_process() == before
    assert capfd.readouterr().err == ""


def test_error_is_raised_and_the_process_goes_on(llama, token_file, tmp_path):
    before = state_of_process()
    with pytest.raises(ResumeError, match="no such folder"):
        shardq.verify(tmp_path / "nothing")
    with pytest.raises(shardq.ShardQError) as refused:
        shardq.quantize(llama, output=tmp_path / "out", **short(token_file, quant={"bits": 9}))
    assert refused.value.exit_code == 2
    assert state_of_process() == before


def test_interrupted_call_goes_on_where_it_was(llama, token_file, by_command, tmp_path, monkeypatch):
    def commit_and_interrupt(output: Path, block: int | None, *args: object, **facts: object) -> dict:
        line = commit(output, block, *args, **facts)
        signal.raise_signal(signal.SIGINT)  # as Ctrl-C, or a notebook's button
        return line

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("shardq.commands.commit.ledger.commit", commit_and_interrupt)
        shardq.quantize(llama, output=tmp_path / "out", **short(token_file))
    assert not (RunFolder(tmp_path / "out").path / "lock").exists()
    shardq.quantize(llama, output=tmp_path / "out", **short(token_file))
    assert result_files(tmp_path / "out") == result_files(by_command)


def test_call_in_another_thread_works(llama, token_file, tmp_path):
    found = []

    def work() -> None:
        found.append(shardq.quantize(llama, output=tmp_path / "out", **short(token_file, quant={"method": "rtn"})))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found[0]["blocks"] == 3


TWO_RANKS = """
import json, sys
from pathlib import Path
sys.path.insert(0, {here!r})
import torch.distributed as dist
import shardq
from rank_process import run_and_leave
from test_api_runs import short

def main():
    dist.init_process_group("gloo")
    shardq.quantize({model!r}, output={output!r} + "/given", **short(Path({tokens!r})))
    numbers = [None, None]
    dist.all_gather_object(numbers, dist.get_rank())  # the group is as it was
    assert numbers == [0, 1]
    dist.destroy_process_group()
    for name in ("own", "again"):
        shardq.quantize({model!r}, output=f"{output}/{{name}}", **short(Path({tokens!r})))
        assert not dist.is_initialized()
    try:
        shardq.quantize({model!r}, output={output!r} + "/own", seed=7, **short(Path({tokens!r})))
    except shardq.ShardQError as error:
        print(json.dumps([dist.is_initialized(), error.agreed, type(error).__name__]), flush=True)

run_and_leave(main)
"""


@pytest.mark.slow
def test_ranks_of_torchrun_make_the_same_calls_in_a_group_of_theirs_or_of_ours(llama, token_file, two_ranks, tmp_path):
    program = tmp_path / "program.py"
    facts = {"here": str(Path(__file__).parent), "model": str(llama), "tokens": str(token_file)}
    program.write_text(TWO_RANKS.format(output=str(tmp_path), **facts))
    finished = tiny.torchrun(2, program)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count('[false, true, "ResumeError"]') == 2
    for name in ("given", "own", "again"):
        assert result_files(tmp_path / name) == result_files(two_ranks[0])


FAILING = """
import os, sys
from pathlib import Path
sys.path.insert(0, {here!r})
import shardq
from rank_process import run_and_leave
from shardq.errors import StorageError
from shardq.parallel.allreduce import AllReduceStepper
from test_api_runs import short

def main():
    options = short(Path({tokens!r}), parallel={{"engine": "allreduce"}})
    step, steps = AllReduceStepper.step, []

    def step_or_fail(stepper):
        steps.append(None)
        if len(steps) > 5 and os.environ["RANK"] == "1":
            raise StorageError("disk of one rank is full")
        step(stepper)

    AllReduceStepper.step = step_or_fail
    try:
        shardq.quantize({model!r}, output={output!r}, **options)
    except shardq.ShardQError as error:
        print("raised", type(error).__name__, error.where, flush=True)
    AllReduceStepper.step = step
    print("then", shardq.quantize({model!r}, output={output!r}, **options)["blocks"], flush=True)

run_and_leave(main)
"""


@pytest.mark.slow
def test_error_of_one_rank_is_raised_on_all_and_the_same_call_goes_on(llama, token_file, tmp_path):
    program = tmp_path / "program.py"
    facts = {"here": str(Path(__file__).parent), "model": str(llama), "tokens": str(token_file)}
    program.write_text(FAILING.format(output=str(tmp_path / "out"), **facts))
    finished = tiny.torchrun(2, program)
    assert finished.returncode == 0, finished.stderr
    said = finished.stdout
    assert "raised RankError rank 0" in said and "raised StorageError rank 1" in said and said.count("then 3") == 2
