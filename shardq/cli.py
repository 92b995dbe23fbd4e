"""The command line: arguments to a config, a command to its ranks, an error to one line and an exit code."""

import json
import os
import sys

from shardq import __version__
from shardq.arguments import make_config, take_apart
from shardq.errors import ConfigError, Interrupted, ShardQError
from shardq.help import help_text
from shardq.logs import print_error, tell_launcher
from shardq.recipe import as_recipe
from shardq.spelling import nearest
from shardq.verbs import COMMANDS, Command, Config, return_freed_tensors, running


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
    lines = [f"  {name:10} {command.help}" for name, command in COMMANDS.items()]
    print("usage: shardq COMMAND [options]\n\n" + "\n".join(lines) + "\n\nshardq COMMAND --help explains every option.")
    sys.exit(0)


def run_command(verb: str, arguments: list[str]) -> None:
    """Run one command on this rank and exit with its code; an error is one line on standard error."""
    return_freed_tensors()
    try:
        _run(COMMANDS[verb], parse(verb, arguments))
    except ShardQError as error:
        is_first_on_host = os.environ.get("LOCAL_RANK", "0") == "0"  # every host has a console of its own
        if is_first_on_host or not error.agreed:
            print_error(str(error), error.where)
        tell_launcher(str(error), error.exit_code)
        _leave(error.exit_code)
    _leave(0)


def _run(command: Command, config: Config) -> None:
    from shardq.liveness.interrupts import interruptible, print_interruption
    from shardq.parallel.ranks import started

    try:
        with interruptible(command.resume_advice), running(command, config, started) as ranks:
            summary = command.run(config, ranks)
            if ranks.rank == 0:
                print(json.dumps(summary), flush=True)
    except Interrupted as error:
        print_interruption(error)
        _leave(error.exit_code)


def parse(verb: str, arguments: list[str]) -> Config:
    """The config of a command line: defaults, --config files from left to right, options; --help prints and exits.

    Raises:
        ConfigError: an option is unknown, missing or of the wrong type; the same on every rank of a host.
    """
    config_class = COMMANDS[verb].config
    try:
        given = take_apart(arguments, config_class)
        if "help" in given.flags:
            print(help_text(verb, COMMANDS[verb].help, config_class))
            sys.exit(0)
        if "version" in given.flags:
            print(f"shardq {__version__}")
            sys.exit(0)
        config: Config = make_config(config_class, given, verb)
        if "print-config" in given.flags:
            print(as_recipe(config), end="")
            sys.exit(0)
        return config
    except ConfigError as error:
        error.agreed = True
        raise


def _leave(code: int) -> None:
    """Exit at once.

    An orderly shutdown of a broken process group may wait for ranks that are gone; and at the end of a good run, a
    torch thread that wakes during the interpreter's shutdown aborts the process.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
