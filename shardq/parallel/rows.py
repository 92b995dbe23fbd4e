"""The `rows` engine: each rank quantizes and trains its rows of every linear, and only weights and gradients travel.

Rounding, its gradient and the optimizer's step treat each output channel separately. So a rank holds frozen weight, s2,
moments and s2's gradient of its own output channels only. Ranks exchange fake-quantized weights and the gradients in
them, both in the dtype of the matrix multiplies. This is ZeRO's second stage (arXiv 1910.02054, section 5), where the
tensors that the weight is computed from take the place of the optimizer's float32 copy.
"""

from collections.abc import Callable, Iterable
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from shardq.optimize.block_quantizer import BlockQuantizer
from shardq.optimize.linear_quantizer import LinearQuantizer
from shardq.optimize.options import OptimizeOptions
from shardq.optimize.share import Result
from shardq.optimize.stepper import LocalStepper
from shardq.parallel.collectives import together
from shardq.parallel.engine import Engine, Kind
from shardq.parallel.ranks import Ranks, contact
from shardq.quant.grid import row_chunks


class Rows(Engine):
    """The engine in which each rank holds its part of every linear's outputs."""

    def share(self, dtype: torch.dtype) -> "RowShare":
        return RowShare(self.ranks, self.options.dtype)

    def stepper(self, quantizer: BlockQuantizer, options: OptimizeOptions) -> "RowStepper":
        return RowStepper(quantizer, options)

    def rank_bytes(self, kind: Kind, num_bytes: int) -> int:
        return num_bytes // self.ranks.world_size

    @property
    def writer(self) -> int:
        return self.ranks.rank


class RowStepper(LocalStepper):
    """A LocalStepper over this rank's rows; a step is skipped on all ranks if a gradient is not finite on any."""

    def _gradient_norm(self) -> Tensor:
        norm = super()._gradient_norm()
        with contact("comparing gradients"):
            dist.all_reduce(norm)
        return norm


class RowShare:
    """A rank's part of every linear's outputs: consecutive channels, in parts that differ in size by at most one."""

    def __init__(self, ranks: Ranks, dtype: torch.dtype):
        self._ranks, self._dtype = ranks, dtype
        self._under_way: list[dist.Work] = []

    def outputs(self, num_outputs: int) -> slice:
        return self._slices(num_outputs)[self._ranks.rank]

    def made(self, quantizer: LinearQuantizer) -> None:
        """Do nothing: the quantizer was allocated for this rank's rows only."""

    def joined(self, parts: Iterable[Tensor], num_outputs: Iterable[int]) -> list[Tensor]:
        """Join every rank's parts; one part is sent while the next is computed."""
        whole = [_Join.apply(part, self, num) for part, num in zip(parts, num_outputs, strict=True)]
        with contact("exchanging weights"):
            for work in self._under_way:
                work.wait()
        self._under_way.clear()
        return whole

    def agreed(self, work: Callable[[], Result]) -> Result:
        return together(self._ranks, work)

    def spread(self, part: Tensor, num_outputs: int) -> Tensor:
        """Gather the ranks' parts [O/ranks, ...] into one tensor [O, ...]; waits for the pending transfer."""
        whole = part.new_empty(num_outputs, *part.shape[1:])
        whole[self.outputs(num_outputs)] = part
        with contact("exchanging weights"):
            for rank, outputs in enumerate(self._slices(num_outputs)):
                if whole[outputs].numel():
                    self._under_way.append(dist.broadcast(whole[outputs], src=rank, async_op=True))
        return whole

    def averaged(self, gradient: Tensor) -> Tensor:
        """The mean over ranks of this rank's rows of a gradient [O, I], summed in float32 piece by piece."""
        dtype = self._dtype if gradient.itemsize > self._dtype.itemsize else gradient.dtype
        shares = self._slices(len(gradient))
        mean = gradient.new_empty(len(gradient[shares[self._ranks.rank]]), gradient.shape[1])
        longest = max((gradient[share] for share in shares), key=len)
        for some in row_chunks(longest):  # the same pieces on every rank, the last one shorter on some
            pieces = [gradient[share][some] for share in shares]
            sent, sizes = torch.cat(pieces).to(dtype), [len(piece) for piece in pieces]
            received = sent.new_empty(len(sizes), len(mean[some]), sent.shape[1])
            with contact("exchanging gradients"):
                dist.all_to_all_single(received.flatten(0, 1), sent, [received.shape[1]] * len(sizes), sizes)
            mean[some] = received.sum(0, dtype=torch.float32).div_(len(sizes))
        return mean

    def _slices(self, num_outputs: int) -> list[slice]:
        bounds = [num_outputs * rank // self._ranks.world_size for rank in range(self._ranks.world_size + 1)]
        return [slice(*ends) for ends in pairwise(bounds)]


class _Join(torch.autograd.Function):
    """`RowShare.spread` as the forward pass, `RowShare.averaged` as the backward pass."""

    @staticmethod
    def forward(ctx, part, share, num_outputs):
        """The joined tensor [O, ...]."""
        ctx.share = share
        return share.spread(part, num_outputs)

    @staticmethod
    def backward(ctx, gradient):
        """The gradient in this rank's part."""
        return ctx.share.averaged(gradient), None, None
