"""How far a quantized block's output is from the fp block's."""

from dataclasses import dataclass

import torch
from torch import Tensor


def distillation_loss(output_NTD: Tensor, target_NTD: Tensor) -> Tensor:
    """Training loss: squared error summed over the sequence, mean over samples and channels.

    Source: AIMET's AdaScale. Adam does not see the loss's size but for its eps, which this size keeps negligible.
    """
    return (output_NTD - target_NTD).square().sum(1).mean()


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


def error_sums(output_NTD: Tensor, target_NTD: Tensor) -> ErrorSums:
    """Error and power of one pass, summed in float64."""
    squared_error = (output_NTD - target_NTD).square().sum(dtype=torch.float64)
    return ErrorSums(squared_error.item(), target_NTD.square().sum(dtype=torch.float64).item())
