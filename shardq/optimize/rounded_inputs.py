"""What enters a block's linears, rounded to its grid while the block is trained."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from shardq.quant.activation import ActivationGrid, ActivationLevels, RoundThrough, token_grid
from shardq.quant.options import ActivationOptions


class RoundedInputs:
    """Rounds what enters the named linears of a block; made once, for each block's grids in turn.

    Static grids are tensors that are overwritten in place, and the hooks are the same for all blocks: what was compiled
    with them goes on to hold.
    """

    def __init__(self, block: nn.Module, linear_names: list[str], options: ActivationOptions):
        """Allocate for the named linears of a block, on its device; none where activations stay as they are."""
        self._linears = {name: block.get_submodule(name) for name in linear_names}
        self._grids: dict[str, tuple[Tensor, Tensor]] = {}
        for name, linear in self._linears.items():
            if options.granularity == "tensor":
                self._grids[name] = torch.ones((), device=linear.weight.device), torch.zeros_like(linear.weight[0, 0])
        self._hooks = {}
        for name in linear_names:
            levels = ActivationLevels(bits=options.bits, symmetric=options.symmetric)
            self._hooks[name] = _hook(self._grids.get(name), levels)

    @contextmanager
    def active(self, grids: dict[str, ActivationGrid]) -> Iterator[None]:
        """Round while the body runs.

        Args:
            grids: by name of the activation, `NAME.input`; of those not named, the last block's, or a token's own.
        """
        for name, (scale, zero_point) in self._grids.items():
            if f"{name}.input" in grids:
                scale.fill_(grids[f"{name}.input"].scale)
                zero_point.fill_(grids[f"{name}.input"].zero_point)
        handles = [linear.register_forward_pre_hook(self._hooks[name]) for name, linear in self._linears.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _hook(static: tuple[Tensor, Tensor] | None, levels: ActivationLevels) -> Callable:
    def round_input(linear: nn.Module, inputs: tuple) -> Tensor:
        (values,) = inputs
        grid = static or token_grid(values.detach().float(), levels)
        return RoundThrough.apply(values, *grid, levels)

    return round_input
