"""How a block's quantizers are trained."""

from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class OptimizeOptions:
    """Blockwise distillation. What is not given comes from the preset."""

    preset: Literal["aimet"] = "aimet"
    """Set of defaults. `aimet`: 1500 iterations, learning rates 1e-3 (grid) and 5e-4 (weight), fp_mix 0.5, as AIMET."""
    iterations: int | None = None
    """Optimizer steps a block, at any number of ranks (preset aimet: 1500)."""
    batch_size: int | None = None
    """Samples an optimizer step over all ranks together, a multiple of the number of ranks (default: one a rank)."""
    grid_lr: float | None = None
    """Learning rate of the grid's parameters, beta and gamma or the step (preset aimet: 1e-3)."""
    weight_lr: float | None = None
    """Learning rate of the weight's parameters, s2 and s3 (preset aimet: 5e-4)."""
    fp_mix: float | None = None
    """Probability, for each element of the block's input, of the fp stream's value in place of the quantized stream's
    (preset aimet: 0.5)."""


PRESETS = {"aimet": {"iterations": 1500, "grid_lr": 1e-3, "weight_lr": 5e-4, "fp_mix": 0.5}}


def resolved(options: OptimizeOptions, world_size: int) -> OptimizeOptions:
    """Options with every value that was not given filled in from the preset and the number of ranks."""
    defaults = PRESETS[options.preset] | {"batch_size": world_size}
    missing = {name: value for name, value in defaults.items() if getattr(options, name) is None}
    return replace(options, **missing)
