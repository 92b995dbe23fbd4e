"""The command line: arguments to a config, a command to its ranks, an error to one line and an exit code."""

import ctypes
import json
import logging
import os
import re
import sys
from collections.abc import Callable

import jsonargparse

from shardq.compiling import keep_between_runs
from shardq.config import EvaluateConfig, ExportConfig, QuantizeConfig, TuneConfig, VerifyConfig
from shardq.devices import memory_errors
from shardq.errors import ConfigError, Interrupted, ShardQError
from shardq.interrupts import interruptible, print_interruption
from shardq.logs import print_error
from shardq.parallel.ranks import Ranks, started, this_rank
from shardq.pipeline.evaluate import evaluate
from shardq.pipeline.export import export
from shardq.pipeline.run import quantize
from shardq.pipeline.tune import tune
from shardq.pipeline.verify import verify

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # malloc.h

Config = QuantizeConfig | TuneConfig | EvaluateConfig | ExportConfig | VerifyConfig

COMMANDS: dict[str, tuple[type, Callable, str]] = {
    "quantize": (
        QuantizeConfig,
        quantize,
        "Quantize a model block by block; the last line of output is JSON.",
    ),
    "tune": (TuneConfig, tune, "Tune a finished run's scales end to end; the last line of output is JSON."),
    "evaluate": (EvaluateConfig, evaluate, "Measure a model's perplexity; the last line of output is JSON."),
    "export": (ExportConfig, export, "Convert a finished run for other programs; the last line of output is JSON."),
    "verify": (
        VerifyConfig,
        verify,
        "Check every file of a run or an export; the last line of output is JSON.",
    ),
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
    lines = [f"  {name:10} {text}" for name, (_, _, text) in COMMANDS.items()]
    print("usage: shardq COMMAND [options]\n\n" + "\n".join(lines) + "\n\nshardq COMMAND --help explains every option.")
    sys.exit(0 if verb in ("-h", "--help") else ConfigError.exit_code)


def run_command(verb: str, arguments: list[str]) -> None:
    """Run one command on this rank and exit with its code; an error is one line on standard error."""
    for library in ("huggingface_hub", "datasets", "transformers"):
        logging.getLogger(library).setLevel(logging.ERROR)  # retries and hints; a failure becomes our own line
    return_freed_tensors()
    keep_between_runs()
    try:
        config = parse(verb, arguments)
        advice = IF_INTERRUPTED.get(verb, "the same command does it anew")
        with interruptible(advice), started(config.device) as ranks, memory_errors(IF_MEMORY_IS_SHORT[verb]):
            summary = COMMANDS[verb][1](config, ranks)
            _print_summary(ranks, summary)
    except ShardQError as error:
        is_first_on_host = os.environ.get("LOCAL_RANK", "0") == "0"  # every host has a console of its own
        if is_first_on_host or not error.agreed:
            print_error(str(error), error.where if error.agreed else this_rank())
        _leave(error.exit_code)
    except Interrupted as error:
        print_interruption(error)
        _leave(error.exit_code)
    _leave(0)


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
    """Defaults, then --config files from left to right, then single options.

    Raises:
        ConfigError: an option is unknown, missing or of the wrong type; the same on every rank of a host.
    """
    parser = _make_parser(verb)
    try:
        options = parser.instantiate(parser.parse_args(arguments)).as_dict()
    except (jsonargparse.ArgumentError, TypeError, ValueError, RecursionError) as error:  # the others: odd recipes
        reason = re.sub(r'^Parser key "(.+?)":', r"\1:", " ".join(str(error).split()))
        wrong = ConfigError(f"{reason}; {verb} --help lists the options")
        wrong.agreed = True
        raise wrong from error
    del options["config"]  # the recipes' names; their content is in the other options
    return COMMANDS[verb][0](**options)


def _make_parser(verb: str) -> jsonargparse.ArgumentParser:
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    config_class, _, description = COMMANDS[verb]
    parser = jsonargparse.ArgumentParser(
        prog=f"shardq {verb}",
        description=description,
        exit_on_error=False,
        allow_abbrev=False,
        default_config_files=[],
        print_config="--print-config",
    )
    parser.add_argument("--config", action="config", help="YAML recipe; may be given several times.")
    parser.add_class_arguments(config_class, as_positional=True)  # fields that are not keyword-only
    return parser


def _print_summary(ranks: Ranks, summary: dict) -> None:
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
