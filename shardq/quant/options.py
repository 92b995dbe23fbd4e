"""What gets a grid: the linears that never do, and which activations get which."""

from dataclasses import dataclass
from typing import Literal

DEFAULT_IGNORE = ("lm_head", "*embed*")  # linears that are never quantized


@dataclass(frozen=True, kw_only=True)
class ActivationOptions:
    """Grids of activations."""

    bits: int | None = None
    """Bits of activations, 4 to 16 (default: activations have no grid, and of the options below only kv_bits
    applies)."""
    kv_bits: int | None = None
    """Bits of keys and values, 4 to 16 (default: as other activations)."""
    tensors: Literal["inputs", "all"] = "inputs"
    """Which activations: `inputs` of the quantized linears, as servers round them; or `all` that can be reached: inputs
    and outputs of the block and of every module in it, and attention's query, key, value, scores,
    probabilities and context."""
    symmetric: bool = True
    """Symmetric grids, or asymmetric ones."""
    granularity: Literal["tensor", "token"] = "tensor"
    """`tensor`: one grid for all values, found from the calibration samples; `token`: one for each token, found while
    the model runs, with nothing to collect."""
    observer: Literal["minmax", "average", "percentile", "sqnr"] = "minmax"
    """Range of a tensor's grid: `minmax` of all values; `average` of the samples' own extremes; `percentile`; `sqnr`,
    where the noise of rounding and clipping is least (AIMET's tf-enhanced)."""
    percentile: float = 99.99
    """Percentile that the upper end of the range is at; the lower end leaves as many values below it."""

    in_training: bool = False
    """Train blocks with what enters their linears rounded (W8A8, W4A8), straight through for gradients: a tensor's
    grid is then that of the fp stream, and the quantized stream moves on through rounded activations."""

    @property
    def asked(self) -> bool:
        """Whether any activation gets a grid."""
        return self.bits is not None or self.kv_bits is not None
