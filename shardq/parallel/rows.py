"""Rows over ranks: each rank quantizes and trains its part of every linear's outputs, and only weights travel.

Rounding, its gradient and the optimizer's step act on each output channel alone. So a rank holds frozen weight, s2,
moments and s2's gradient of its outputs and no others; what all ranks need of it is the fake-quantized weight, and what
they know of its gradient, both in the dtype of the matrix multiplies. It is ZeRO's second stage (arXiv 1910.02054,
section 5), with all that the weight is computed from in the place of the optimizer's float32 copy.
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
    """The engine of ranks that each hold their part of every linear's outputs."""

    def share(self, dtype: torch.dtype) -> "RowShare":
        """The rank's rows."""
        return RowShare(self.ranks, self.options.dtype)

    def stepper(self, quantizer: BlockQuantizer, options: OptimizeOptions) -> "RowStepper":
        """Each rank steps its rows."""
        return RowStepper(quantizer, options)

    def rank_bytes(self, kind: Kind, num_bytes: int) -> int:
        """Everything is shared out."""
        return num_bytes // self.ranks.world_size

    @property
    def writer(self) -> int:
        """Each rank saves its rows."""
        return self.ranks.rank


class RowStepper(LocalStepper):
    """A LocalStepper over this rank's rows; whether a step counts is all ranks' affair."""

    def _gradient_norm(self) -> Tensor:
        norm = super()._gradient_norm()
        with contact("comparing gradients"):
            dist.all_reduce(norm)
        return norm


class RowShare:
    """A rank's part of every linear's outputs: neighbours, as many as the others have or one more."""

    def __init__(self, ranks: Ranks, dtype: torch.dtype):
        self._ranks, self._dtype = ranks, dtype
        self._under_way: list[dist.Work] = []

    def outputs(self, num_outputs: int) -> slice:
        """This rank's."""
        return self._slices(num_outputs)[self._ranks.rank]

    def made(self, quantizer: LinearQuantizer) -> None:
        """It is one of the rank's own rows."""

    def joined(self, parts: Iterable[Tensor], num_outputs: Iterable[int]) -> list[Tensor]:
        """Every rank's parts; a part leaves while the next is computed."""
        whole = [_Join.apply(part, self, num) for part, num in zip(parts, num_outputs, strict=True)]
        with contact("exchanging weights"):
            for work in self._under_way:
                work.wait()
        self._under_way.clear()
        return whole

    def agreed(self, work: Callable[[], Result]) -> Result:
        """Work that fails on all ranks if on any."""
        return together(self._ranks, work)

    def spread(self, part: Tensor, num_outputs: int) -> Tensor:
        """The whole that every rank's part becomes, once what is under way has come."""
        whole = part.new_empty(num_outputs, *part.shape[1:])
        whole[self.outputs(num_outputs)] = part
        with contact("exchanging weights"):
            for rank, outputs in enumerate(self._slices(num_outputs)):
                if whole[outputs].numel():
                    self._under_way.append(dist.broadcast(whole[outputs], src=rank, async_op=True))
        return whole

    def averaged(self, gradient: Tensor) -> Tensor:
        """The mean over ranks of this rank's part of a whole gradient [O, I], added up in float32 piece by piece."""
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
    """`RowShare.spread`, and `averaged` on the way back."""

    @staticmethod
    def forward(ctx, part, share, num_outputs):
        """Return the whole [O, ...]."""
        ctx.share = share
        return share.spread(part, num_outputs)

    @staticmethod
    def backward(ctx, gradient):
        """The part's gradient."""
        return ctx.share.averaged(gradient), None, None
