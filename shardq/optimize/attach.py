"""Put AdaScale linears into a block, and take quantized ones out."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from shardq.errors import QuantizationError
from shardq.optimize.linear import AdaScaleLinear, Method
from shardq.quant.quantized import QuantizedLinear
from shardq.quant.spec import QuantSpec


def attach(block: nn.Module, linear_names: list[str], spec: QuantSpec, method: Method) -> None:
    """Replace the named linears by AdaScale linears at their start, in place."""
    for name in linear_names:
        _replace(block, name, AdaScaleLinear(block.get_submodule(name), spec, method))


@torch.no_grad()
def fold(block: nn.Module, linear_names: list[str], stored: Callable[[Tensor], Tensor]) -> dict[str, QuantizedLinear]:
    """Replace the AdaScale linears by the linears they came from, their weights quantized, in place.

    Args:
        stored: rounds a dequantized weight to what the output checkpoint stores, so that the block computes with
            exactly the weights that are served.

    Returns:
        The quantized linears by name within the block.

    Raises:
        QuantizationError: training drove a parameter or a scale to a value that is not finite, or a scale to 0.
    """
    quantized = {}
    for name in linear_names:
        trained = block.get_submodule(name)
        linear = trained.folded()
        parameters = dict(trained.named_parameters()) | {"scale": linear.scale_OG}
        wrong = [kind for kind, value in parameters.items() if not torch.isfinite(value).all()]
        if wrong or not (linear.scale_OG > 0).all():
            raise QuantizationError(
                f"{name}: {', '.join(wrong) or 'scale'} is not finite and positive after training; "
                "lower optimize.grid_lr and optimize.weight_lr"
            )
        original = trained.original[0]
        original.weight = nn.Parameter(stored(linear.dequantized()).to(original.weight.dtype), requires_grad=False)
        _replace(block, name, original)
        quantized[name] = linear
    return quantized


def _replace(block: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(block.get_submodule(parent), last, module)
