"""Ranks as torchrun starts them, ended as a command of shardq ends: with its line last, and with its exit code."""

import logging
import signal
import sys

from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from shardq.errors import RankError

CONSEQUENCES = (RankError.exit_code, -signal.SIGTERM, 128 + signal.SIGTERM)  # of another rank's failure


def main() -> None:
    """Entry point: torchrun's options, a program and its options; exits with the code of the rank that failed first.

    torchrun itself exits with 1 whatever a rank's code is, and prints a stack of its own after a rank's last line.
    """
    logging.disable(logging.CRITICAL)  # this process is torchrun's alone, and what it has to say are ranks' ends
    try:
        torchrun.run(torchrun.parse_args(sys.argv[1:]))
    except ChildFailedError as error:
        code = _cause([(failure.timestamp, failure.exitcode) for failure in error.failures.values()])
        sys.exit(code if code > 0 else 128 - code)
    except SignalException as error:
        sys.exit(128 + error.sigval)


def _cause(ends: list[tuple[int, int]]) -> int:
    """The exit code of the rank that failed by itself, of those of all that failed.

    Args:
        ends: of each the second and the code; torchrun looks several times a second, and ends the others in turn.
    """
    first = min(second for second, _ in ends)
    codes = [code for second, code in sorted(ends, key=lambda end: end[0]) if second <= first + 1]
    return next((code for code in codes if code not in CONSEQUENCES), codes[0])
