"""A decoder block: its plan before it is loaded, and the block with its weights."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from shardq.matrix import Matrix
from shardq.model.arguments import BlockArguments, Call, Entering
from shardq.model.hidden import hidden_in
from shardq.model.skeleton import Skeleton
from shardq.quant.activation import ActivationLevels
from shardq.quant.grid import Grid


@dataclass(frozen=True, kw_only=True)
class BlockPlan:
    """A decoder block and how it is to be quantized.

    Attributes:
        index: its place in the model.
        name: its name in the checkpoint, such as `model.layers.0`.
        is_last: whether no block follows.
        grids: the grid of each matrix to quantize, in the order of the block's modules.
        activations: the grids that are asked for, by name of the activation within the block, in the order of its code.
        arguments: its arguments other than the hidden states; None until they are recorded.
    """

    index: int
    name: str
    is_last: bool
    grids: dict[Matrix, Grid] = field(default_factory=dict)
    activations: dict[str, ActivationLevels] = field(default_factory=dict)
    arguments: BlockArguments | None = None

    @property
    def num_weights(self) -> int:
        """Number of weights in all matrices to quantize."""
        return sum(matrix.num_weights for matrix in self.grids)

    @property
    def num_scales(self) -> int:
        """Number of scales of all matrices to quantize."""
        return sum(grid.num_scales(*matrix.shape) for matrix, grid in self.grids.items())

    def full_name(self, matrix: Matrix) -> str:
        """A matrix' name in the model, which is the name of its codes in files."""
        return f"{self.name}.{matrix.name}"


def block_plans(skeleton: Skeleton, grids: Sequence[dict[Matrix, Grid]] | None = None) -> list[BlockPlan]:
    """The plans of a model's blocks, in order.

    Args:
        grids: for each block, the grid of each matrix to quantize; None: nothing is quantized.
    """
    last = len(skeleton.names) - 1
    return [
        BlockPlan(index=index, name=name, is_last=index == last, grids=grids[index] if grids else {})
        for index, name in enumerate(skeleton.names)
    ]


@dataclass(frozen=True, kw_only=True)
class LoadedBlock:
    """A block with its weights; a call with its input, for some samples, gives its output.

    Attributes:
        module: has float32 weights; all blocks of the same structure share one module, with other weights in turn.
        source: parameters and persistent buffers by name within the block, in the source's dtype.
        dtype: dtype of the matrix multiplies.
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
        """Hidden states [N, T, D], float32, and tensors that are carried for later blocks."""
        call = self.plan.arguments.bound(entering)
        return self.plan.arguments.leaving(returned_by(self.module, call, self.dtype), call, entering)


def run_block(block: nn.Module, call: Call, dtype: torch.dtype) -> Tensor:
    """Hidden states that leave a block, in the model's own form, float32; arguments as `returned_by`."""
    return hidden_in(returned_by(block, call, dtype)).float()


def returned_by(block: nn.Module, call: Call, dtype: torch.dtype) -> object:
    """What a block returns, hidden states first or nothing else.

    Args:
        dtype: dtype of the matrix multiplies; norms, softmax and the residual stream stay in float32.
    """
    with multiplying_in(dtype, call.hidden.device):
        return block(call.hidden, *call.args, **call.kwargs)


def multiplying_in(dtype: torch.dtype, device: torch.device) -> AbstractContextManager:
    """Context in which matrix multiplies are in a dtype."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)
