"""Where activations between blocks are kept."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class CacheOptions:
    """Activation cache."""

    placement: Literal["cpu", "disk"] = "disk"
    """`disk`: files, memory does not grow with the samples, a resume goes on at once; `cpu`: in memory, faster, a
    resume computes the activations again."""
    folder: str | None = None
    """Where the files go: a fast disk, on each host its own if there are several (default: the output folder)."""
