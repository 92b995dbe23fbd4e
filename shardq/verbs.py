"""Every verb of the command line and of the Python API: its options, its function, how to go on after a failure.

The functions that compute import torch, which takes seconds; help and a refused option do without it.
"""

import ctypes
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from shardq.config import EvaluateConfig, ExportConfig, QuantizeConfig, TuneConfig, VerifyConfig
from shardq.errors import ShardQError

if TYPE_CHECKING:
    from shardq.parallel.ranks import Ranks

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # malloc.h
TALKATIVE = ("huggingface_hub", "datasets", "transformers")

Config = QuantizeConfig | TuneConfig | EvaluateConfig | ExportConfig | VerifyConfig


@dataclass(frozen=True, kw_only=True)
class Command:
    """A verb.

    Attributes:
        config: the class of its options.
        run: executes the verb on a rank and returns its summary.
        help: one line that says what the verb does.
        memory_advice: what to do if memory is short.
        resume_advice: how to go on after an interruption.
    """

    config: type
    run: Callable[[Config, "Ranks"], dict]
    help: str
    memory_advice: str = "free some and run the same command again"
    resume_advice: str = "the same command does it from the start"


def _imported(verb: str) -> Callable[[Config, "Ranks"], dict]:
    """The function of `shardq.commands` that is named after a verb, imported when it is called."""

    def run(config: Config, ranks: "Ranks") -> dict:
        return getattr(import_module(f"shardq.commands.{verb}"), verb)(config, ranks)

    return run


COMMANDS = {
    "quantize": Command(
        config=QuantizeConfig,
        run=_imported("quantize"),
        help="Quantize a model block by block; the last line of output is JSON.",
        memory_advice="free some and run the same command again, or begin in another --output with a smaller "
        "--optimize.micro_batch, --optimize.memory_gib or --calib.sequence_length",
        resume_advice="the same command goes on after the blocks that are finished",
    ),
    "tune": Command(
        config=TuneConfig,
        run=_imported("tune"),
        help="Tune a finished run's scales end to end; the last line of output is JSON.",
        memory_advice="free some and run the same command again, or run it on a run with a smaller "
        "--calib.sequence_length",
        resume_advice="the same command goes on after the last steps that were saved",
    ),
    "evaluate": Command(
        config=EvaluateConfig,
        run=_imported("evaluate"),
        help="Measure a model's perplexity; the last line of output is JSON.",
        memory_advice="free some and run the same command again, or lower --eval.sequence_length",
    ),
    "export": Command(
        config=ExportConfig,
        run=_imported("export"),
        help="Convert a finished run for other programs; the last line of output is JSON.",
    ),
    "verify": Command(
        config=VerifyConfig,
        run=_imported("verify"),
        help="Check every file of a run or an export; the last line of output is JSON.",
    ),
}


@contextmanager
def running(
    command: Command, config: Config, joined: Callable[[str], AbstractContextManager["Ranks"]]
) -> Iterator["Ranks"]:
    """Run a command in the body: with the other ranks, failed allocations as errors, and silent libraries.

    Args:
        joined: joins the other ranks on a device, as `shardq.parallel.ranks` does.

    Raises:
        ShardQError: any error of the body; it names the rank unless all ranks raise it.
    """
    from shardq.devices import memory_errors
    from shardq.parallel.ranks import this_rank

    device = getattr(config, "device", "cpu")  # an export or a check computes nothing that a GPU would do faster
    try:
        with _quiet(TALKATIVE), joined(device) as ranks, memory_errors(command.memory_advice):
            yield ranks
    except ShardQError as error:
        error.where = error.where if error.agreed else this_rank()
        raise


@contextmanager
def _quiet(libraries: tuple[str, ...]) -> Iterator[None]:
    """Keep retries and hints of libraries from the console during the body; a failure becomes an error of our own."""
    loggers = [logging.getLogger(library) for library in libraries]
    former = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, former, strict=True):
            logger.setLevel(level)


def return_freed_tensors() -> None:
    """Return freed tensors of large models to the system, and keep all other memory in one arena.

    By default glibc keeps more and more of the freed memory and gives each thread an arena, so that peak memory grows
    with the number of blocks. Smaller tensors stay for reuse: new memory for them costs up to half of a step or a pass.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option:
        set_option(M_MMAP_THRESHOLD, 16 << 20)
        set_option(M_TRIM_THRESHOLD, 1 << 30)
        set_option(M_ARENA_MAX, 1)
