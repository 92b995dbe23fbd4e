"""Rounding of the inputs of a block's matrices to their grids while the block is trained."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from shardq.matrix import Matrix, hooked
from shardq.quant.activation import ActivationGrid, ActivationLevels, RoundThrough, token_grid
from shardq.quant.options import ActivationOptions


class RoundedInputs:
    """Rounds the inputs of some matrices of a block; made once, then used with each block's grids in turn.

    Static grids are tensors that are overwritten in place, and the hooks are the same for all blocks, so code that was
    compiled with them stays valid.
    """

    def __init__(self, block: nn.Module, matrices: Iterable[Matrix], options: ActivationOptions):
        """Allocate for some matrices of a block, on its device; nothing where activations are not quantized."""
        self._block = block
        self._grids: dict[Matrix, tuple[Tensor, Tensor] | None] = {}
        self._hooks: dict[Matrix, Callable] = {}
        for matrix in matrices:
            like, is_static = matrix.weight_in(block), options.granularity == "tensor"
            self._grids[matrix] = (torch.ones((), device=like.device), like.new_zeros(())) if is_static else None
            levels = ActivationLevels(bits=options.bits, symmetric=options.symmetric)
            self._hooks[matrix] = _hook(self._grids[matrix], levels)

    @contextmanager
    def active(self, grids: dict[str, ActivationGrid]) -> Iterator[None]:
        """Round while the body runs.

        Args:
            grids: by name of the activation; one not named keeps the last block's grid, or has one for each token.
        """
        for matrix, static in self._grids.items():
            if static and matrix.input in grids:
                scale, zero_point = static
                scale.fill_(grids[matrix.input].scale)
                zero_point.fill_(grids[matrix.input].zero_point)
        with hooked(self._block, self._hooks):
            yield


def _hook(static: tuple[Tensor, Tensor] | None, levels: ActivationLevels) -> Callable:
    def round_input(module: nn.Module, inputs: tuple) -> Tensor:
        (values,) = inputs
        grid = static or token_grid(values.detach().float(), levels)
        return RoundThrough.apply(values, *grid, levels)

    return round_input
