"""How ranks share a block's training."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # options are read before torch is imported, which takes seconds
    import torch


@dataclass(frozen=True, kw_only=True)
class ParallelOptions:
    """What each rank holds of a block that is being trained."""

    engine: Literal["auto", "local", "rows", "allreduce", "zero1", "zero2", "zero3"] = "auto"
    """`local`: a single rank; `rows`: every rank trains its part of each linear's outputs, and only the quantized
    weight is whole; `allreduce`: every rank holds everything; DeepSpeed's `zero1` shards the optimizer's state over
    ranks, `zero2` the gradients too, `zero3` the frozen weight, s2 and s3 too. `auto`: `local` on one rank, else
    `allreduce` where that fits the memory, `rows` where not."""
    reduce_dtype: Literal["float32", "bf16"] = "float32"
    """Dtype in which gradients travel between ranks and are added up; `bf16` halves the bytes and rounds the sums."""
    offload: bool = False
    """Keep the optimizer state of a ZeRO engine in CPU memory."""
    deepspeed: str | None = None
    """Further DeepSpeed settings for a ZeRO engine: `frugal` where the last GiB counts, `overlap` where GPUs have room,
    or the path of a JSON file, with entries such as `zero_optimization.reduce_bucket_size`."""

    @property
    def dtype(self) -> "torch.dtype":
        """What `reduce_dtype` stands for."""
        import torch

        return {"float32": torch.float32, "bf16": torch.bfloat16}[self.reduce_dtype]
