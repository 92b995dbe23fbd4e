"""The check that formats of integer codes make first."""

from shardq.errors import ConfigError
from shardq.quant.grid import Grid
from shardq.quant.integer_grid import IntegerGrid


def integer_grid(format_name: str, grid: Grid) -> IntegerGrid:
    """The grid as an integer grid.

    Raises:
        ConfigError: the grid is of another kind.
    """
    if not isinstance(grid, IntegerGrid):
        raise ConfigError(f"{format_name}: only integer grids are supported, not {grid.description}; export hf instead")
    return grid
