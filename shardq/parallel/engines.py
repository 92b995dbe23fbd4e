"""From options to engines."""

from dataclasses import replace

from shardq.parallel.allreduce import AllReduce
from shardq.parallel.engine import Engine
from shardq.parallel.local import Local
from shardq.parallel.options import ParallelOptions
from shardq.parallel.ranks import Ranks
from shardq.parallel.rows import Rows
from shardq.parallel.zero import Zero


def engine_for(options: ParallelOptions, ranks: Ranks) -> Engine:
    """The engine that the options name; not for `auto`."""
    match options.engine:
        case "local":
            return Local(options, ranks)
        case "allreduce":
            return AllReduce(options, ranks)
        case "rows":
            return Rows(options, ranks)
        case _:
            return Zero(options, ranks)


def candidates(options: ParallelOptions, ranks: Ranks) -> list[Engine]:
    """The engine that the options name; for `auto` the engines to choose from, ordered from fastest to smallest."""
    names = [options.engine]
    if options.engine == "auto":
        names = ["local"] if ranks.world_size == 1 else ["allreduce", "rows"]
    return [engine_for(replace(options, engine=name), ranks) for name in names]
