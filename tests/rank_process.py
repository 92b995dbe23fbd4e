"""How the workers of these tests end."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from shardq.parallel.ranks import Ranks


def run_and_leave(main: Callable[[], None]) -> None:
    """Call `main`; if it ends well, end the process at once, as the programs of the package do.

    In an interpreter that is being taken down, a thread of torch's that wakes aborts the process.
    """
    try:
        main()
    except SystemExit as error:
        if error.code:
            raise
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def end_apart(ranks: Ranks, folder: Path, note: dict, check_alone: Callable[[], None]) -> None:
    """Rank 1 leaves the group and lives on, rank 0 does `check_alone`; then both write their notes and end."""
    if ranks.rank == 0:
        check_alone()
    else:
        dist.destroy_process_group()  # its connections end in the middle of the run
    (folder / f"rank-{ranks.rank}.json").write_text(json.dumps(note))
    sys.exit(0)  # rank 0 has no group left to take leave of
