"""Losses between a quantized block's output and the fp block's: of the hidden states, or of their predictions."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Loss = Literal["squared", "token"]
POWER_FLOOR = 1e-12  # a position whose target is all zeros must not make the loss infinite
LOGITS_TOKENS = 256  # positions whose logits are in memory at once

ToLogits = Callable[[Tensor], Tensor]
PredictionError = Callable[..., tuple[Tensor, Tensor]]


def distillation_loss(output_NTD: Tensor, target_NTD: Tensor, kind: Loss = "squared") -> Tensor:
    """Training loss: squared error summed over the sequence, mean over samples and channels.

    `squared` is the loss of AIMET's AdaScale. `token` divides each position's error by the target's mean square there.
    The optimizers' steps depend on the size of the loss only through their eps, which is negligible at these sizes.
    """
    return _errors(output_NTD, target_NTD, kind).sum(1).mean()


def _errors(output_NTD: Tensor, target_NTD: Tensor, kind: Loss) -> Tensor:
    squared_NTD = (output_NTD - target_NTD).square()
    if kind == "squared":
        return squared_NTD
    return squared_NTD / target_NTD.square().mean(-1, keepdim=True).clamp(min=POWER_FLOOR)


@torch.no_grad()
def summed_probabilities(hidden_NTD: Tensor, to_logits: ToLogits) -> Tensor:
    """Expected count of each token [V] as the next one: its probability, summed over all positions."""
    return sum(to_logits(hidden_1TD).float().softmax(-1).sum((0, 1)) for (hidden_1TD,) in _pieces(hidden_NTD))


def prediction_error(
    logits_NTV: Tensor, target_NTV: Tensor, labels_NT: Tensor, label_weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Distance in nats of the predictions from the target's and from the text, and its gradient in the logits.

    Args:
        labels_NT: the next tokens of the text, or -1 where none is known.
        label_weight: weight w of the labels' cross-entropy; the KL divergence has 1 - w. A tensor of one value, so
            that compiled code is valid for every weight.

    Returns:
        sum over the positions of (1 - w) sum_v p_v (log p_v - log q_v) - w log q_label, where p is the target's softmax
        and q the prediction's, and w is 0 without a label; its gradient [N, T, V] in the logits' dtype.
    """
    log_q_NTV, log_p_NTV = (logits.float().log_softmax(-1) for logits in (logits_NTV, target_NTV))
    p_NTV = log_p_NTV.exp()
    labels_NT1 = labels_NT[..., None]
    weight_NT1 = label_weight * (labels_NT1 >= 0).float()
    divergence_NT1 = (p_NTV * (log_p_NTV - log_q_NTV)).sum(-1, keepdim=True)
    cross_entropy_NT1 = -log_q_NTV.gather(-1, labels_NT1.clamp(min=0))
    value = ((1 - weight_NT1) * divergence_NT1 + weight_NT1 * cross_entropy_NT1).sum()
    # A comparison, unlike a write at indices, is fused into one pass over the logits when it is compiled; in float32,
    # which represents every token exactly, its vectors have the width of the logits'.
    is_label_NTV = torch.arange(p_NTV.shape[-1], dtype=torch.float32, device=p_NTV.device) == labels_NT1.float()
    wanted_NTV = torch.where(is_label_NTV, weight_NT1, 0) + (1 - weight_NT1) * p_NTV
    return value, (log_q_NTV.exp() - wanted_NTV).to(logits_NTV.dtype)


def prediction_loss(
    output_NTD: Tensor,
    target_NTD: Tensor,
    labels_NT: Tensor,
    label_weight: float,
    to_logits: ToLogits,
    kernel: PredictionError = prediction_error,
) -> Tensor:
    """Training loss of the last block's output: `prediction_error` summed over the sequence, mean over samples.

    Only some positions' logits [T, V] are in memory at a time: each position's gradient in the hidden state is computed
    with its loss.

    Args:
        labels_NT, label_weight: as in `prediction_error`.
        to_logits: from hidden states [N, T, D] to logits [N, T, V], position by position; differentiable.
        kernel: `prediction_error`, plain or compiled.
    """
    return _PredictionLoss.apply(output_NTD, target_NTD, labels_NT, label_weight, to_logits, kernel) / len(output_NTD)


class _PredictionLoss(torch.autograd.Function):
    """Prediction error summed over all positions."""

    @staticmethod
    def forward(ctx, output_NTD, target_NTD, labels_NT, label_weight, to_logits, kernel):
        """Compute the gradient too."""
        total, gradients = torch.zeros((), device=output_NTD.device), []
        label_weight = output_NTD.new_full((), label_weight)  # filled there: a copy would wait for the device
        for output_1TD, target_1TD, labels_1T in _pieces(output_NTD, target_NTD, labels_NT):
            with torch.enable_grad():
                output_1TD = output_1TD.detach().requires_grad_(True)
                logits_1TV = to_logits(output_1TD)
            value, gradient_1TV = kernel(logits_1TV.detach(), to_logits(target_1TD), labels_1T, label_weight)
            total += value
            gradients += torch.autograd.grad(logits_1TV, output_1TD, gradient_1TV)
            del logits_1TV, gradient_1TV
        ctx.save_for_backward(torch.cat(gradients, 1).view_as(output_NTD))
        return total

    @staticmethod
    def backward(ctx, gradient):
        """The gradient in the output; the other arguments have none."""
        return ctx.saved_tensors[0] * gradient, None, None, None, None, None


def _pieces(*given: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same positions [1, T, ...] of each tensor, piece by piece; a piece may cross samples."""
    return zip(*(values_NTX.flatten(0, 1)[None].split(LOGITS_TOKENS, 1) for values_NTX in given), strict=True)


@dataclass(frozen=True)
class ErrorSums:
    """Sums from which the reported loss is computed; they add up over ranks and passes.

    Attributes:
        error: sum of (output - target)^2 over all elements, or of the positions' divergences.
        weight: sum of target^2 over all elements, or the number of positions.
    """

    error: float = 0.0
    weight: float = 0.0

    def __add__(self, other: "ErrorSums") -> "ErrorSums":
        return ErrorSums(self.error + other.error, self.weight + other.weight)

    @property
    def loss(self) -> float:
        """Mean squared error over the target's mean square, or mean divergence: comparable, and 0 is perfect."""
        return self.error / max(self.weight, torch.finfo(torch.float32).tiny)


def error_sums(output_NTD: Tensor, target_NTD: Tensor, kind: Loss = "squared") -> ErrorSums:
    """Error and power of one pass, summed in float64; `token`: each position's relative error, and power 1."""
    error = _errors(output_NTD, target_NTD, kind).sum(dtype=torch.float64)
    power = target_NTD.square().sum(dtype=torch.float64) if kind == "squared" else target_NTD.numel()
    return ErrorSums(float(error), float(power))


@torch.no_grad()
def prediction_sums(
    output_NTD: Tensor, target_NTD: Tensor, to_logits: ToLogits, kernel: PredictionError = prediction_error
) -> ErrorSums:
    """Summed KL divergence of one pass's predictions, and the number of positions; arguments as `prediction_loss`."""
    without_NT = torch.full(output_NTD.shape[:2], -1, device=output_NTD.device)
    pieces, weight = _pieces(output_NTD, target_NTD, without_NT), output_NTD.new_zeros(())
    total = sum(
        float(kernel(to_logits(output_1TD), to_logits(target_1TD), labels_1T, weight)[0])
        for output_1TD, target_1TD, labels_1T in pieces
    )
    return ErrorSums(total, float(output_NTD.shape[:2].numel()))
