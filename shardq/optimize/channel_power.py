"""The power of each input channel of a block's matrices."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from shardq.matrix import Matrix, hooked


@contextmanager
def channel_power(block: nn.Module, matrices: Iterable[Matrix]) -> Iterator[dict[str, Tensor]]:
    """Sum the squares of the inputs of some matrices, while the block computes within the body.

    Yields:
        by name of the matrix, the sum over all positions of the squared input channels [I], float32; 0 for a matrix
        that no position reached.
    """

    def added_to(sums_I: Tensor):
        def add(module: nn.Module, inputs: tuple) -> None:
            sums_I.add_(inputs[0].detach().float().square().flatten(0, -2).sum(0))

        return add

    power = {matrix: torch.zeros(matrix.shape[1], device=matrix.weight_in(block).device) for matrix in matrices}
    with hooked(block, {matrix: added_to(sums_I) for matrix, sums_I in power.items()}):
        yield {matrix.name: sums_I for matrix, sums_I in power.items()}
