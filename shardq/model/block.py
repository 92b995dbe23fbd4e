"""A decoder block: what is known of it before it is loaded, and with its weights."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from shardq.matrix import Matrix
from shardq.model.arguments import BlockArguments, Entering
from shardq.model.skeleton import Skeleton
from shardq.quant.activation import ActivationLevels
from shardq.quant.grid import Grid


@dataclass(frozen=True, kw_only=True)
class BlockPlan:
    """A decoder block and what is to become of it.

    Attributes:
        index: its place in the model.
        name: in the checkpoint, such as `model.layers.0`.
        is_last: whether no block follows.
        grids: of each matrix to quantize, in the order of the block's modules.
        activations: the grids that are asked for, by name of the activation within the block, in the order of its code.
        arguments: what the model passes to it beside the hidden states; None until that is recorded.
    """

    index: int
    name: str
    is_last: bool
    grids: dict[Matrix, Grid] = field(default_factory=dict)
    activations: dict[str, ActivationLevels] = field(default_factory=dict)
    arguments: BlockArguments | None = None

    @property
    def num_weights(self) -> int:
        """Of all matrices to quantize together."""
        return sum(matrix.num_weights for matrix in self.grids)

    @property
    def num_scales(self) -> int:
        """Of all matrices to quantize together."""
        return sum(grid.num_scales(*matrix.shape) for matrix, grid in self.grids.items())

    def full_name(self, matrix: Matrix) -> str:
        """A matrix' name in the model, under which files have its codes."""
        return f"{self.name}.{matrix.name}"


def block_plans(skeleton: Skeleton, grids: Sequence[dict[Matrix, Grid]] | None = None) -> list[BlockPlan]:
    """A plan of each block of a model.

    Args:
        grids: for each block those of the matrices to quantize; None: nothing is quantized.
    """
    last = len(skeleton.names) - 1
    return [
        BlockPlan(index=index, name=name, is_last=index == last, grids=grids[index] if grids else {})
        for index, name in enumerate(skeleton.names)
    ]


@dataclass(frozen=True, kw_only=True)
class LoadedBlock:
    """A block with its weights; called with what enters it, for some samples, it gives what leaves it.

    Attributes:
        module: its weights are float32; the same module, with other weights, for all blocks that are built alike.
        source: parameters and persistent buffers by name within the block, in the source's dtype.
        dtype: of the matrix multiplies.
    """

    plan: BlockPlan
    module: nn.Module
    source: dict[str, Tensor]
    dtype: torch.dtype

    @property
    def index(self) -> int:
        """Its place in the model."""
        return self.plan.index

    def __call__(self, entering: Tensor | Entering) -> Tensor | Entering:
        """Hidden states [N, T, D], float32, and what the block carries for later ones."""
        call = self.plan.arguments.bound(entering)
        return self.plan.arguments.leaving(run_block(self.module, *call, self.dtype), call)


def run_block(block: nn.Module, hidden_NTD: Tensor, args: tuple, kwargs: dict, dtype: torch.dtype) -> Tensor:
    """Hidden states [N, T, D] that leave a block, float32.

    Args:
        args, kwargs: what the model passes beside the hidden states.
        dtype: of the matrix multiplies; norms, softmax and the residual stream stay in float32.
    """
    with multiplying_in(dtype, hidden_NTD.device):
        output = block(hidden_NTD, *args, **kwargs)
    return (output[0] if isinstance(output, tuple | list) else output).float()


def multiplying_in(dtype: torch.dtype, device: torch.device) -> AbstractContextManager:
    """Where matrix multiplies are in a dtype."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)
