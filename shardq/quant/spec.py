"""The integer grid under the name that is going away."""

from shardq.quant.integer_grid import IntegerGrid as QuantSpec
from shardq.quant.options import DEFAULT_IGNORE

__all__ = ["DEFAULT_IGNORE", "QuantSpec"]
