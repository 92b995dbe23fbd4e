"""How far a quantized block's output is from the fp block's."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Loss = Literal["squared", "token"]
POWER_FLOOR = 1e-12  # a position whose target is all zeros must not make the loss infinite


def distillation_loss(output_NTD: Tensor, target_NTD: Tensor, kind: Loss = "squared") -> Tensor:
    """Training loss: squared error summed over the sequence, mean over samples and channels.

    `squared` is AIMET's AdaScale's. `token` divides each position's error by the target's mean square there. The
    optimizers do not see the loss's size but for their eps, which these sizes keep negligible.
    """
    return _errors(output_NTD, target_NTD, kind).sum(1).mean()


def _errors(output_NTD: Tensor, target_NTD: Tensor, kind: Loss) -> Tensor:
    squared_NTD = (output_NTD - target_NTD).square()
    if kind == "squared":
        return squared_NTD
    return squared_NTD / target_NTD.square().mean(-1, keepdim=True).clamp(min=POWER_FLOOR)


@dataclass(frozen=True)
class ErrorSums:
    """Sums from which the loss that users see is made; over ranks and passes they add up.

    Attributes:
        squared_error: sum over all elements of (output - target)^2.
        target_power: sum over all elements of target^2.
    """

    squared_error: float = 0.0
    target_power: float = 0.0

    def __add__(self, other: "ErrorSums") -> "ErrorSums":
        return ErrorSums(self.squared_error + other.squared_error, self.target_power + other.target_power)

    @property
    def relative_loss(self) -> float:
        """Mean squared error over the target's mean square: comparable between blocks, 0 is perfect."""
        return self.squared_error / max(self.target_power, torch.finfo(torch.float32).tiny)


def error_sums(output_NTD: Tensor, target_NTD: Tensor, kind: Loss = "squared") -> ErrorSums:
    """Error and power of one pass, summed in float64; `token`: relative error of each position, 1 for its power."""
    error = _errors(output_NTD, target_NTD, kind).sum(dtype=torch.float64)
    power = target_NTD.square().sum(dtype=torch.float64) if kind == "squared" else target_NTD.numel()
    return ErrorSums(float(error), float(power))
