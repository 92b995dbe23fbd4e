"""An engine: everything that depends on how ranks share the training of a block."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Literal

import torch

from shardq.optimize.block_quantizer import BlockQuantizer
from shardq.optimize.options import OptimizeOptions
from shardq.optimize.share import Everything, Share
from shardq.optimize.stepper import LocalStepper, Stepper
from shardq.parallel.options import ParallelOptions
from shardq.parallel.ranks import Ranks

Kind = Literal["weights", "gradients", "moments"]
Demand = tuple[bool, str, object, str]  # whether it is met, the option, its value, what is allowed


@dataclass(frozen=True)
class BlockSize:
    """A block's bytes in the checkpoint, and its number of trained weights: in all linears, and in the largest one."""

    source: int
    num_weights: int
    largest_linear: int


class Engine:
    """How ranks share the training of a block. In this base class each rank holds everything and steps by itself.

    Attributes:
        options: the options that chose this engine.
    """

    def __init__(self, options: ParallelOptions, ranks: Ranks):
        self.options, self.ranks = options, ranks

    def demands(self) -> Iterator[Demand]:
        """Conditions that the options have to meet.

        Raises:
            ConfigError: a file that the options name cannot be used.
        """
        offload, file, without = self.options.offload, self.options.deepspeed, "without a ZeRO engine"
        yield not offload, "parallel.offload", offload, f"false {without} (zero1, zero2, zero3)"
        yield file is None, "parallel.deepspeed", file, f"left out {without} (zero1, zero2, zero3)"

    def share(self, dtype: torch.dtype) -> Share:
        """The share of each linear that a rank quantizes; `dtype` is that of the source's weights."""
        return Everything()

    def stepper(self, quantizer: BlockQuantizer, options: OptimizeOptions) -> Stepper:
        """The stepper of a quantizer that was made with the engine's share."""
        return LocalStepper(quantizer, options)

    def rank_bytes(self, kind: Kind, num_bytes: int) -> int:
        """Bytes on a rank's device out of a block's `num_bytes` of one kind; `weights` are frozen weights and s2."""
        return num_bytes

    @property
    def keeps_gradients(self) -> bool:
        """Whether the memory for gradients is allocated while the fake-quantized weights are still in memory."""
        return False

    def moved_bytes(self, size: BlockSize) -> int:
        """Bytes of copies that exist at the same time in order to be reduced and gathered."""
        return 0

    @property
    def writer(self) -> int:
        """The rank that saves this rank's part of the training state."""
        return 0

    def made_with(self) -> dict:
        """The settings that have to be unchanged for saved training state to be resumed."""
        chosen = asdict(self.options)
        del chosen["deepspeed"]  # the name of a file, not its content
        return chosen
