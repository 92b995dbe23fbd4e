"""Data-parallel: every rank holds the whole state and steps by the mean gradient."""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shardq.optimize.block_quantizer import BlockQuantizer
from shardq.optimize.options import OptimizeOptions
from shardq.optimize.stepper import LocalStepper, trainable
from shardq.parallel.engine import Demand, Engine
from shardq.parallel.ranks import contact
from shardq.torch_internals import flattened, unflattened

# Least number of values in one collective: gradients smaller than that, which are all but those of s2, wait for one
# another. From about a megabyte on, the fixed cost of a collective is small.
BUCKET_SIZE = 1 << 18


class AllReduce(Engine):
    """The engine in which every rank holds the whole training state."""

    def demands(self) -> Iterator[Demand]:
        several = self.ranks.world_size > 1
        yield several, "parallel.engine", self.options.engine, "local or zero* on one rank"
        yield from super().demands()

    def stepper(self, quantizer: BlockQuantizer, options: OptimizeOptions) -> "AllReduceStepper":
        return AllReduceStepper(quantizer, options, self.options.dtype, self.ranks.world_size)


class AllReduceStepper(LocalStepper):
    """A LocalStepper that averages gradients over ranks before each step, so that equal parameters stay equal.

    A gradient is sent as soon as backward has computed it, while backward goes on with the next linear; `step` waits
    for the means. The graph is the same on all ranks, so all send their gradients in the same order.
    """

    def __init__(self, module: nn.Module, options: OptimizeOptions, dtype: torch.dtype, world_size: int):
        super().__init__(module, options)
        self._dtype, self._world_size = dtype, world_size
        self._waiting: list[nn.Parameter] = []
        self._sent: list[tuple[list[nn.Parameter], Tensor, dist.Work]] = []
        for group in trainable(module):
            for parameter in group:
                parameter.register_post_accumulate_grad_hook(self._leave)

    def step(self) -> None:
        if self._waiting:
            self._send(self._waiting)
            self._waiting = []
        for parameters, bucket, work in self._sent:
            with contact("averaging gradients"):
                work.wait()
            mean = bucket.float().div_(self._world_size)
            for parameter, gradient in zip(parameters, unflattened(mean, parameters), strict=True):
                parameter.grad = gradient
        self._sent.clear()
        super().step()

    def _leave(self, parameter: nn.Parameter) -> None:
        if parameter.numel() >= BUCKET_SIZE:
            self._send([parameter])
            return
        self._waiting.append(parameter)
        if sum(waiting.numel() for waiting in self._waiting) >= BUCKET_SIZE:
            self._send(self._waiting)
            self._waiting = []

    def _send(self, parameters: list[nn.Parameter]) -> None:
        bucket = flattened([parameter.grad for parameter in parameters]).to(self._dtype)
        for parameter in parameters:
            parameter.grad = None  # `step` sets the mean here; until then only the bucket takes memory
        with contact("averaging gradients"):
            self._sent.append((parameters, bucket, dist.all_reduce(bucket, async_op=True)))
