"""Runs that are killed within a block and go on from its checkpoint; `test_training_checkpoints.py` starts it.

    python tests/e2e/checkpoint_kills.py FOLDER ENGINE RANKS CASE...

Prints a JSON line for each case: files that differ from the uninterrupted run's, steps that were done after the kill in
the block that was killed, checkpoints that there were between.
"""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from crashes import Setting, die, launch, output_of, what_is_wrong
from runs import result_files
from shardq.optimize.stepper import LocalStepper
from shardq.parallel.allreduce import AllReduceStepper
from shardq.parallel.zero import DeepSpeedStepper
from shardq.rundir.folder import RunFolder
from shardq.training import checkpoint

ITERATIONS, EVERY, KILLED_AT = 8, 3, 5  # killed in the second block, at an iteration of it
STEPS = 2 * ITERATIONS  # of that block, which is the last
MORE = ["--optimize.iterations", ITERATIONS, "--checkpoint.every_iterations", EVERY, "--optimize.fp_mix", 0.5]


def killed_after_step(stepper: type) -> None:
    """Have this process killed after a step of the second block."""
    step, calls = stepper.step, []

    def step_and_die(self: object) -> None:
        step(self)
        calls.append(None)
        if len(calls) == ITERATIONS + KILLED_AT:
            die()

    stepper.step = step_and_die


def killed_in_second_save(how: str) -> None:
    """Have this process killed as it writes the second block's second checkpoint, or before the first is removed."""
    owner, name = (checkpoint, "write_checked") if how == "writing" else (shutil, "rmtree")
    original, calls = getattr(owner, name), []

    def wrapped(path: Path, *args: object, **kwargs: object) -> None:
        if "block-00001" in str(path):
            calls.append(path)
        if calls and (how == "removing" or "iteration-000006" in str(path)):
            die()
        original(path, *args, **kwargs)

    setattr(owner, name, wrapped)


def state_files(output: Path) -> list[Path]:
    return sorted(RunFolder(output).checkpoint.rglob("state-*.safetensors"))


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def edit_iteration(path: Path) -> None:
    """Another number of the same length in the header."""
    content = path.read_bytes()
    assert content.count(b'\\"done\\": 3') == 1
    path.write_bytes(content.replace(b'\\"done\\": 3', b'\\"done\\": 4'))


DAMAGES: dict[str, Callable[[Path], None]] = {
    "flipped": flip_a_bit, "truncated": truncate, "edited": edit_iteration, "missing": Path.unlink,
}  # fmt: skip


def try_case(case: str, arguments: list[str], num_ranks: int, stepper: type, reference: dict[str, bytes]) -> dict:
    """Kill, damage what the case says, go on."""
    output = output_of(arguments)
    in_save = case in ("writing", "removing")
    before = (lambda: killed_in_second_save(case)) if in_save else lambda: killed_after_step(stepper)
    who = 0 if case == "removing" or stepper is not DeepSpeedStepper else num_ranks - 1
    statuses = launch(arguments, num_ranks, who, before)
    assert os.WIFSIGNALED(statuses[who]) and os.WTERMSIG(statuses[who]) == signal.SIGKILL, (statuses, who)
    folders = sorted(path.name for path in RunFolder(output).checkpoint.iterdir())
    if case in DAMAGES:
        DAMAGES[case](state_files(output)[-1])
    events = output / "events.jsonl"
    seen = len(events.read_text().splitlines())
    wrong = what_is_wrong(arguments, num_ranks, reference)
    new = [json.loads(line) for line in events.read_text().splitlines()[seen:]]
    steps = [event["iterations"] for event in new if event["span"] == "train" and event["rank"] == 0]
    return {"case": case, "wrong": wrong, "steps": steps, "folders": folders}


def main() -> None:
    torch.set_num_threads(1)
    folder, engine, ranks, *cases = sys.argv[1:]
    num_ranks, more = int(ranks), [*MORE, "--parallel.engine", engine]
    stepper = {"local": LocalStepper, "allreduce": AllReduceStepper}.get(engine, DeepSpeedStepper)
    if stepper is DeepSpeedStepper:
        os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed  # noqa: F401 - once, not in every fork
    if num_ranks > 1:
        more += ["--optimize.held_out", 1]
    setting = Setting(Path(folder))
    whole = [*setting.arguments("whole"), *map(str, more), "--checkpoint.every_iterations", "0"]
    assert not any(launch(whole, num_ranks))
    reference = result_files(setting.folder / "whole")
    for case in cases:
        arguments = [*setting.arguments(case), *map(str, more)]
        print(json.dumps(try_case(case, arguments, num_ranks, stepper, reference)), flush=True)


if __name__ == "__main__":
    main()
