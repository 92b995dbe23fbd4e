"""Ranks as torchrun starts them, ended as a command of shardq ends: with its line last, and with its exit code."""

import logging
import sys

from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from shardq.errors import RankError


def main() -> None:
    """Entry point: torchrun's options, a program and its options; exits with the code of the rank that failed first.

    torchrun itself exits with 1 whatever a rank's code is, and prints a stack of its own after a rank's last line.
    """
    logging.disable(logging.CRITICAL)  # this process is torchrun's alone, and what it has to say are ranks' ends
    try:
        torchrun.run(torchrun.parse_args(sys.argv[1:]))
    except ChildFailedError as error:
        # A rank that ends because of another may be looked at first.
        causes = error.failures.values()
        first = min(causes, key=lambda failure: (failure.exitcode == RankError.exit_code, failure.timestamp))
        sys.exit(first.exitcode if first.exitcode > 0 else 128 - first.exitcode)
    except SignalException as error:
        sys.exit(128 + error.sigval)
