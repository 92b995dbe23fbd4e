"""Start ranks through torchrun, and end as a command of shardq ends: with its line last and its exit code."""

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
    logging.disable(logging.CRITICAL)  # only torchrun runs in this process, and it logs only that ranks ended
    try:
        torchrun.run(torchrun.parse_args(sys.argv[1:]))
    except ChildFailedError as error:
        code = _cause([(failure.timestamp, failure.exitcode) for failure in error.failures.values()])
        sys.exit(code if code > 0 else 128 - code)
    except SignalException as error:
        sys.exit(128 + error.sigval)


def _cause(ends: list[tuple[int, int]]) -> int:
    """Of all failed ranks, the exit code of the one that failed first and by itself.

    Args:
        ends: second and exit code of each failed rank; torchrun polls several times a second, then ends the others.
    """
    first = min(second for second, _ in ends)
    codes = [code for second, code in sorted(ends, key=lambda end: end[0]) if second <= first + 1]
    return next((code for code in codes if code not in CONSEQUENCES), codes[0])
