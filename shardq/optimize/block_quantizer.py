"""The quantizers of a block's linears, and how their weights get into the block and out of it."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from shardq.errors import QuantizationError
from shardq.optimize.linear_quantizer import LinearQuantizer, Method
from shardq.quant.adascale import Kernels
from shardq.quant.quantized import QuantizedLinear
from shardq.quant.spec import QuantSpec

Gathered = Callable[..., AbstractContextManager]


def whole(module: nn.Module, changed: bool = False) -> AbstractContextManager:
    """A stepper's `gathered` where every rank holds all parameters."""
    return nullcontext()


class BlockQuantizer(nn.Module):
    """One LinearQuantizer for each named linear of a block; made once, started anew for each block's weights.

    The block stays what it is: its linears' weights are overwritten, first with fake-quantized ones that collect
    gradients, in the end with the ones that are served. Thereby a forward and a backward through the block are the
    model's own, the same compiled code for every block, and the weights are quantized once per optimizer step however
    many micro-batches go through.
    """

    def __init__(
        self,
        block: nn.Module,
        linear_names: list[str],
        spec: QuantSpec,
        method: Method,
        kernels: Kernels,
        dtype: torch.dtype,
    ):
        """Allocate for the named linears of a block, whose weights will be in `dtype` while they are trained."""
        super().__init__()
        self.names = linear_names
        self.quantizers = nn.ModuleList(
            LinearQuantizer(block.get_submodule(name).weight, spec, method) for name in linear_names
        )
        # In a tuple: not submodules, whose parameters would be counted as trainable.
        self._linears = tuple(block.get_submodule(name) for name in linear_names)
        self._kernels, self._dtype = kernels, dtype
        self._quantized: list[Tensor] = []

    def start(
        self,
        source: dict[str, Tensor],
        importance: dict[str, Tensor] | None = None,
        gathered: Gathered = whole,
    ) -> None:
        """Go to the start, round-to-nearest, for the weights `NAME.weight` in `source`, of any float dtype.

        Args:
            importance: by linear's name, of its input channels [I]; the start grid of those named is searched with it.
            gathered: the stepper's, where there is one.
        """
        for name, quantizer in zip(self.names, self.quantizers, strict=True):
            with gathered(quantizer, True):
                quantizer.start(source[f"{name}.weight"], (importance or {}).get(name))

    def restart(self, gathered: Gathered = whole) -> None:
        """Go back to the start for the weights at hand.

        Args:
            gathered: the stepper's, where there is one.
        """
        for quantizer in self.quantizers:
            with gathered(quantizer, True):
                quantizer.restart()

    def forward(self) -> list[Tensor]:
        """The fake-quantized weights [O, I], in the order of the names; differentiable."""
        return [quantizer(self._dtype, self._kernels) for quantizer in self.quantizers]

    def load(self, quantized: list[Tensor]) -> None:
        """Write fake-quantized weights into the block; gradients that reach them are collected there."""
        self._quantized = quantized
        for linear, weight_OI in zip(self._linears, self._quantized, strict=True):
            linear.weight.data = weight_OI.detach()
            linear.weight.requires_grad_(True)
            linear.weight.grad = None

    def collected(self) -> tuple[list[Tensor], list[Tensor]]:
        """Fake-quantized weights of the last `load`, and the gradients collected since: where to go on back."""
        weights, self._quantized = self._quantized, []
        gradients = []
        for linear in self._linears:
            # A linear that no sample reached, such as an idle expert's, has none; all ranks step it all the same.
            gradients.append(torch.zeros_like(linear.weight) if linear.weight.grad is None else linear.weight.grad)
            linear.weight.grad = None
        return weights, gradients

    def folded(self, gathered: Gathered = whole) -> dict[str, QuantizedLinear]:
        """The quantized linears by name that the quantizers stand for now.

        Args:
            gathered: the stepper's, where there is one.

        Raises:
            QuantizationError: training drove a parameter or a scale to a value that is not finite, or a scale to one
                that its grid does not have.
        """
        linears = {}
        for name, quantizer in zip(self.names, self.quantizers, strict=True):
            with gathered(quantizer):
                linears[name] = _checked(name, quantizer)
        return linears

    @torch.no_grad()
    def serve(self, linears: dict[str, QuantizedLinear], stored: Callable[[Tensor], Tensor]) -> None:
        """Write quantized weights into the block, as they will be served.

        Args:
            stored: rounds a dequantized weight to what the output checkpoint stores; with bf16 matrix multiplies the
                weights are then rounded to that.
        """
        self._quantized = []
        for name, linear in zip(self.names, self._linears, strict=True):
            linear.weight.requires_grad_(False)
            linear.weight.grad = None
            linear.weight.data.copy_(stored(linears[name].dequantized()))

    def release(self) -> None:
        """Let go of the source."""
        for quantizer in self.quantizers:
            quantizer.release()


def _checked(name: str, quantizer: LinearQuantizer) -> QuantizedLinear:
    folded = quantizer.folded()
    values = {name: value for name, value in quantizer.named_parameters() if value.requires_grad} | {
        "scale": folded.scale_OG
    }
    wrong = [kind for kind, value in values.items() if not torch.isfinite(value).all()]
    if wrong or not folded.has_valid_scales:
        sign = "nonzero" if folded.spec.full_range else "positive"
        raise QuantizationError(
            f"{name}: {', '.join(wrong) or 'scale'} is not finite and {sign} after training; "
            "lower optimize.grid_lr and optimize.weight_lr"
        )
    return folded
