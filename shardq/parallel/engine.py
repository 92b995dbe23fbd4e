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
    """A block's bytes in the checkpoint, and its weights to train: of all its linears, and of the largest."""

    source: int
    num_weights: int
    largest_linear: int


class Engine:
    """How ranks share training: here each holds everything and steps by itself; subclasses say what they do otherwise.

    Attributes:
        options: in which the engine is this one.
    """

    def __init__(self, options: ParallelOptions, ranks: Ranks):
        self.options, self.ranks = options, ranks

    def demands(self) -> Iterator[Demand]:
        """What has to hold for the options.

        Raises:
            ConfigError: a file that the options name cannot be used.
        """
        offload, file, without = self.options.offload, self.options.deepspeed, "without a ZeRO engine"
        yield not offload, "parallel.offload", offload, f"false {without} (zero1, zero2, zero3)"
        yield file is None, "parallel.deepspeed", file, f"left out {without} (zero1, zero2, zero3)"

    def share(self, dtype: torch.dtype) -> Share:
        """What a rank quantizes of linears whose weights the source has in a dtype."""
        return Everything()

    def stepper(self, quantizer: BlockQuantizer, options: OptimizeOptions) -> Stepper:
        """What steps a quantizer that was made with the engine's share."""
        return LocalStepper(quantizer, options)

    def rank_bytes(self, kind: Kind, num_bytes: int) -> int:
        """Bytes that a rank has on its device of so many of a block; `weights` are the frozen ones and s2."""
        return num_bytes

    @property
    def keeps_gradients(self) -> bool:
        """Whether the place for gradients is there when the first is made, and the quantized weights still are."""
        return False

    def moved_bytes(self, size: BlockSize) -> int:
        """What is copied at once to be reduced and gathered."""
        return 0

    @property
    def writer(self) -> int:
        """The rank that saves what this one holds of the training state."""
        return 0

    def made_with(self) -> dict:
        """Everything that saved training state goes on with only where it is the same."""
        chosen = asdict(self.options)
        del chosen["deepspeed"]  # the name of a file
        return chosen
