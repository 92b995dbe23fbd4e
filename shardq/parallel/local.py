"""The engine for a single rank."""

from collections.abc import Iterator

from shardq.parallel.engine import Demand, Engine


class Local(Engine):
    """The engine of one rank."""

    def demands(self) -> Iterator[Demand]:
        alone = self.ranks.world_size == 1
        yield alone, "parallel.engine", self.options.engine, "allreduce or zero* on several ranks"
        yield from super().demands()
