"""Tuning the scales of quantized linears while their codes stay as they are.

    W^ = exp(f) * s * (q - z)                        f [O, G], 0 at the start
    dL/df = sum over a group of dL/dW^ * W^

Source of the idea: EfficientQAT, arXiv 2407.11062, section 3.3, end-to-end training of quantization parameters; the
logarithm, the optimizer and the target are ours.
"""

import torch
from torch import Tensor, nn

from shardq.errors import QuantizationError
from shardq.optimize.stepper import make_optimizer, set_learning_rates, state_of, take_over
from shardq.quant.quantized import QuantizedLinear


class ScaleTuner:
    """Factors on the scales of one block's linears, the same on every rank, in CPU memory: 8 bytes a scale."""

    def __init__(self, shapes: dict[str, tuple[int, int]], learning_rate: float):
        """Start at factors of 1.

        Args:
            shapes: output channels and groups of each linear by its name.
            learning_rate: of the logarithms, at the start of the schedule.
        """
        self._log_factors = {name: nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()}
        group = {"params": self._parameters, "start_lr": learning_rate}
        self._optimizer = make_optimizer("rms", [group]) if shapes else None

    @property
    def _parameters(self) -> list[nn.Parameter]:
        return list(self._log_factors.values())

    def rescaled(self, linears: dict[str, QuantizedLinear]) -> dict[str, QuantizedLinear]:
        """The block's linears with the scales as tuned so far.

        Raises:
            QuantizationError: a scale is not one of its grid's.
        """
        tuned = {name: linear.rescaled(self._log_factors[name].detach()) for name, linear in linears.items()}
        for name, linear in tuned.items():
            if not linear.has_valid_scales:
                raise QuantizationError(f"{name}: a tuned scale is not one of its grid; lower tune.learning_rate")
        return tuned

    def gradients(self, weights: dict[str, nn.Parameter]) -> dict[str, Tensor]:
        """Gradients in the logarithms, in CPU memory, from dequantized weights [O, I] and their gradients.

        A linear that no sample reached, such as an idle expert's, has no gradient: zeros.
        """
        gradients = {}
        for name, weight_OI in weights.items():
            shape = self._log_factors[name].shape
            if weight_OI.grad is None:
                gradients[name] = torch.zeros(shape)
                continue
            products_OI = weight_OI.grad.float() * weight_OI.detach().float()
            gradients[name] = products_OI.view(*shape, -1).sum(-1).cpu()
        return gradients

    def step(self, gradients: dict[str, Tensor], done: int, num_steps: int) -> None:
        """One optimizer step after `done` of `num_steps`; the learning rate follows a cosine to 0."""
        if self._optimizer is None:
            return
        for name, gradient_OG in gradients.items():
            self._log_factors[name].grad = gradient_OG
        set_learning_rates(self._optimizer, done, num_steps)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def state(self) -> dict[str, Tensor]:
        """The logarithms and the optimizer's state."""
        return dict(state_of(self._optimizer, self._parameters)) if self._optimizer else {}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Load what `state` returned."""
        if self._optimizer:
            take_over(self._optimizer, self._parameters, state)
