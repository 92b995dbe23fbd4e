"""The stepper of a rank that trains its own rows."""

import torch.distributed as dist
from torch import Tensor

from shardq.optimize.stepper import LocalStepper
from shardq.parallel.ranks import contact


class RowStepper(LocalStepper):
    """A LocalStepper over this rank's rows; whether a step counts is all ranks' affair."""

    def _gradient_norm(self) -> Tensor:
        norm = super()._gradient_norm()
        with contact("comparing gradients"):
            dist.all_reduce(norm)
        return norm
