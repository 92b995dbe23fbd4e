"""How strong each input channel of a block's linears is."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def channel_power(block: nn.Module, linear_names: list[str]) -> Iterator[dict[str, Tensor]]:
    """Add up the squares of what enters the named linears, while the block computes within the body.

    Yields:
        for each linear's name the sum over all positions of the squared input channels [I], float32; 0 for a linear
        that no position reached.
    """
    linears = {name: block.get_submodule(name) for name in linear_names}
    power = {name: torch.zeros(linear.in_features, device=linear.weight.device) for name, linear in linears.items()}

    def added_to(sums_I: Tensor):
        def add(linear: nn.Module, inputs: tuple) -> None:
            sums_I.add_(inputs[0].detach().float().square().flatten(0, -2).sum(0))

        return add

    hooks = [linear.register_forward_pre_hook(added_to(power[name])) for name, linear in linears.items()]
    try:
        yield power
    finally:
        for hook in hooks:
            hook.remove()
