"""The command line: arguments to a config, a command to its ranks, an error to one line and an exit code.

What computes is imported by the functions that need it: torch takes seconds, which help and a refused option save.
"""

import ctypes
import json
import logging
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from shardq import __version__
from shardq.arguments import make_config, take_apart
from shardq.config import EvaluateConfig, ExportConfig, QuantizeConfig, TuneConfig, VerifyConfig
from shardq.errors import ConfigError, Interrupted, ShardQError
from shardq.help import help_text
from shardq.logs import print_error, tell_launcher
from shardq.recipe import as_recipe
from shardq.spelling import nearest

if TYPE_CHECKING:
    from shardq.parallel.ranks import Ranks

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # malloc.h

Config = QuantizeConfig | TuneConfig | EvaluateConfig | ExportConfig | VerifyConfig


def _quantize(config: QuantizeConfig, ranks: "Ranks") -> dict:
    from shardq.commands.quantize import quantize

    return quantize(config, ranks)


def _tune(config: TuneConfig, ranks: "Ranks") -> dict:
    from shardq.commands.tune import tune

    return tune(config, ranks)


def _evaluate(config: EvaluateConfig, ranks: "Ranks") -> dict:
    from shardq.commands.evaluate import evaluate

    return evaluate(config, ranks)


def _export(config: ExportConfig, ranks: "Ranks") -> dict:
    from shardq.commands.export import export

    return export(config, ranks)


def _verify(config: VerifyConfig, ranks: "Ranks") -> dict:
    from shardq.commands.verify import verify

    return verify(config, ranks)


COMMANDS: dict[str, tuple[type, Callable, str]] = {
    "quantize": (
        QuantizeConfig,
        _quantize,
        "Quantize a model block by block; the last line of output is JSON.",
    ),
    "tune": (TuneConfig, _tune, "Tune a finished run's scales end to end; the last line of output is JSON."),
    "evaluate": (EvaluateConfig, _evaluate, "Measure a model's perplexity; the last line of output is JSON."),
    "export": (ExportConfig, _export, "Convert a finished run for other programs; the last line of output is JSON."),
    "verify": (VerifyConfig, _verify, "Check every file of a run or an export; the last line of output is JSON."),
}
IF_MEMORY_IS_SHORT = {
    "quantize": "free some and run the same command again, or begin in another --output with a smaller "
    "--optimize.micro_batch, --optimize.memory_gib or --calib.sequence_length",
    "tune": "free some and run the same command again, or run it on a run with a smaller --calib.sequence_length",
    "evaluate": "free some and run the same command again, or lower --eval.sequence_length",
    "export": "free some and run the same command again",
    "verify": "free some and run the same command again",
}
IF_INTERRUPTED = {
    "quantize": "the same command goes on after the blocks that are finished",
    "tune": "the same command goes on after the last steps that were saved",
}


def main() -> None:
    """Entry point of the console command `shardq`: a verb, then the verb's options."""
    verb = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if verb in COMMANDS:
        run_command(verb, sys.argv[2:])
    if verb == "--version":
        print(f"shardq {__version__}")
        sys.exit(0)
    if verb not in ("-h", "--help"):
        meant = "".join(f"did you mean {name}? " for name in nearest(verb, COMMANDS)[:1])
        print_error(f"{verb}: no such command; {meant}There are {', '.join(COMMANDS)}")
        sys.exit(ConfigError.exit_code)
    lines = [f"  {name:10} {text}" for name, (_, _, text) in COMMANDS.items()]
    print("usage: shardq COMMAND [options]\n\n" + "\n".join(lines) + "\n\nshardq COMMAND --help explains every option.")
    sys.exit(0)


def run_command(verb: str, arguments: list[str]) -> None:
    """Run one command on this rank and exit with its code; an error is one line on standard error."""
    return_freed_tensors()
    try:
        _run(verb, parse(verb, arguments))
    except ShardQError as error:
        is_first_on_host = os.environ.get("LOCAL_RANK", "0") == "0"  # every host has a console of its own
        if is_first_on_host or not error.agreed:
            print_error(str(error), error.where)
        tell_launcher(str(error), error.exit_code)
        _leave(error.exit_code)
    _leave(0)


def _run(verb: str, config: Config) -> None:
    from shardq.devices import memory_errors
    from shardq.liveness.interrupts import interruptible, print_interruption
    from shardq.parallel.ranks import started, this_rank

    for library in ("huggingface_hub", "datasets", "transformers"):
        logging.getLogger(library).setLevel(logging.ERROR)  # retries and hints; a failure becomes our own line
    advice = IF_INTERRUPTED.get(verb, "the same command does it anew")
    try:
        with interruptible(advice), started(config.device) as ranks, memory_errors(IF_MEMORY_IS_SHORT[verb]):
            summary = COMMANDS[verb][1](config, ranks)
            _print_summary(ranks, summary)
    except ShardQError as error:
        error.where = error.where if error.agreed else this_rank()
        raise
    except Interrupted as error:
        print_interruption(error)
        _leave(error.exit_code)


def return_freed_tensors() -> None:
    """Have freed tensors of large models go back to the system, and keep the rest of the memory in one piece.

    glibc would keep more and more of what is freed and give each thread memory of its own, so that peak memory grew
    with the number of blocks. Smaller tensors stay for reuse: fetching them anew costs up to half of a step or a pass.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option:
        set_option(M_MMAP_THRESHOLD, 16 << 20)
        set_option(M_TRIM_THRESHOLD, 1 << 30)
        set_option(M_ARENA_MAX, 1)


def parse(verb: str, arguments: list[str]) -> Config:
    """Defaults, then --config files from left to right, then single options; --help and the like print and leave.

    Raises:
        ConfigError: an option is unknown, missing or of the wrong type; the same on every rank of a host.
    """
    config_class, _, description = COMMANDS[verb]
    try:
        given = take_apart(arguments, config_class)
        if "help" in given.flags:
            print(help_text(verb, description, config_class))
            sys.exit(0)
        if "version" in given.flags:
            print(f"shardq {__version__}")
            sys.exit(0)
        config = make_config(config_class, given, verb)
        if "print-config" in given.flags:
            print(as_recipe(config), end="")
            sys.exit(0)
        return config
    except ConfigError as error:
        error.agreed = True
        raise


def _print_summary(ranks: "Ranks", summary: dict) -> None:
    if ranks.rank == 0:
        print(json.dumps(summary), flush=True)


def _leave(code: int) -> None:
    """Exit at once.

    An orderly shutdown of a broken process group may wait for ranks that are gone; and at the end of a good run, a
    thread of torch's that wakes while the interpreter is being taken down aborts the process.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
