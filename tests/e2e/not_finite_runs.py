"""Runs in which one rank meets a number that is not finite in the second block; `test_not_finite.py` starts it.

    python tests/e2e/not_finite_runs.py FOLDER ENGINE RANKS CASE...

Prints a JSON line for each case: the ranks' exit statuses, the ledger's facts, what `shardq verify` finds.
"""

import json
import os
import sys
from pathlib import Path

import torch
from torch import Tensor

from crashes import Setting, launch, output_of
from shardq.commands.verify import find_faults
from shardq.training import objective, trainer

ITERATIONS = 8
BAD_CALL = 1 + ITERATIONS + 4  # compiling's, the first block's, and the fourth iteration of the second's


def not_finite(case: str) -> None:
    """Have this process meet one: `loss` once, `always` from then on in every try, `gradient` beside a finite loss."""
    distillation_loss, calls = trainer.distillation_loss, []

    def wrapped(*args: object) -> Tensor:
        loss = distillation_loss(*args)
        calls.append(None)
        if len(calls) != BAD_CALL and not (case == "always" and len(calls) > BAD_CALL):
            return loss
        if case == "gradient":
            loss.register_hook(lambda gradient: gradient * torch.nan)
            return loss
        return loss + torch.inf

    trainer.distillation_loss = objective.distillation_loss = wrapped


def main() -> None:
    torch.set_num_threads(1)
    folder, engine, ranks, *cases = sys.argv[1:]
    if engine.startswith("zero"):
        os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed  # noqa: F401 - once, not in every fork
    setting = Setting(Path(folder))
    for case in cases:
        more = ["--optimize.iterations", str(ITERATIONS), "--parallel.engine", engine]
        arguments = [*setting.arguments(case), *more]
        who = 0 if case == "gradient" else int(ranks) - 1
        statuses = launch(arguments, int(ranks), who, lambda case=case: not_finite(case))
        lines = (output_of(arguments) / "ledger.jsonl").read_text().splitlines()
        entries = [{name: value for name, value in json.loads(line).items() if name != "files"} for line in lines]
        faults = sum(find_faults(output_of(arguments))[0].values(), [])
        print(json.dumps({"case": case, "statuses": statuses, "entries": entries, "faults": faults}), flush=True)


if __name__ == "__main__":
    main()
