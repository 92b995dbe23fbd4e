"""How a block's quantizers are trained."""

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # options are read before torch is imported, which takes seconds
    import torch


@dataclass(frozen=True, kw_only=True)
class OptimizeOptions:
    """Blockwise distillation. What is not given comes from the preset."""

    preset: Literal["default", "light", "best", "aimet"] = "default"
    """Set of defaults: `default`, `light` with half its iterations, `best` with four times as many, `aimet` as AIMET's
    AdaScale trains."""
    iterations: int | None = None
    """Optimizer steps a block, at any number of ranks; twice as many for a last block that is trained to predictions
    (presets: 200, light 100, best 800, aimet 1500)."""
    batch_size: int | None = None
    """Samples an optimizer step over all ranks together; some ranks wait where it is no multiple of their number
    (default: one a rank; a run that goes on keeps its own, with any number of ranks)."""
    micro_batch: int | None = None
    """Samples of its part of a batch that a rank takes through the block at once (default: as many as fit the memory
    in equal pieces; a run that goes on keeps its own)."""
    memory_gib: float | None = None
    """Memory of the device that a rank may use for training, in GiB (default: 90 % of what is free on a GPU, half of
    the rank's share of what is free on a CPU)."""
    precision: Literal["auto", "float32", "bf16"] = "auto"
    """Dtype of the blocks' matrix multiplies; everything else is float32. `auto`: bf16 where the device multiplies it
    in hardware, float32 elsewhere."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile the training step into fused kernels: `auto` where a compiler is found; `on` stops where none is."""
    start: Literal["minmax", "search"] | None = None
    """Grid that training starts from: `minmax` holds every weight; `search` draws the ends in to where the rounding
    error, weighted by the input channels' mean square, is least (presets: search, aimet minmax)."""
    loss: Literal["squared", "token"] | None = None
    """Error of a block's output: `squared`, or `token`, the squared error at each position relative to the target's
    power there (presets: token, aimet squared)."""
    last_block: Literal["output", "predictions"] | None = None
    """What the last block is trained to: the fp block's `output`, as the other blocks, or the fp model's `predictions`,
    by the KL divergence of the tokens' probabilities, with the head in memory too (presets: predictions, aimet
    output)."""
    label_weight: float | None = None
    """Weight of the cross-entropy with the calibration text's own next tokens in the last block's loss; the divergence
    has the rest of 1 (presets: 0.1, aimet 0)."""
    optimizer: Literal["adam", "rms"] | None = None
    """`rms`, without momentum: each gradient divided by the root mean square of all so far; or `adam`, which takes 4
    bytes a weight more (presets: rms, aimet adam)."""
    held_out: int = 0
    """Calibration samples that are not trained on; the iterate with the lowest loss on them is kept, the start
    included; it is looked for ten times a block. 0: the last iterate is kept."""
    grid_lr: float | None = None
    """Learning rate of the grid's parameters, beta and gamma or the step (presets: 5e-3, aimet 1e-3)."""
    weight_lr: float | None = None
    """Learning rate of the weight's parameters, s2 and s3 (presets at 4 bits and more: 4e-3, light 6e-3, best 3e-3;
    at 3 bits 2 times, at 2 bits 2.5 times that; aimet 5e-4 at any)."""
    experts: Literal["auto", "joint", "parts"] = "auto"
    """Training of routed experts: `joint`, with the rest of their block; or by `parts`, first the rest, then each
    expert by itself on its own tokens, in the memory of a few experts. `auto`: joint where that fits the memory."""
    min_expert_tokens: int = 128
    """Calibration tokens that a routed expert must get to be trained; with fewer it keeps the start, whose search uses
    tokens of all experts instead of the few."""
    retries: int = 2
    """Times that a block in which a loss, a gradient or a scale is not finite is trained again from its start, each
    time at half the learning rates; then it is left at its best finite iterate."""
    fp_mix: float | None = None
    """Probability, for each element of the block's input, of the fp stream's value in place of the quantized stream's
    (presets: 0, aimet 0.5)."""

    @property
    def dtype(self) -> "torch.dtype":
        """What `precision` stands for, once it is resolved."""
        return _dtype(self.precision)


@dataclass(frozen=True, kw_only=True)
class TuneOptions:
    """Tuning of a finished run's scales, end to end, to the float model's predictions and the calibration text."""

    steps: int = 16
    """Optimizer steps. Each takes its samples through all blocks, forward and back."""
    batch_size: int | None = None
    """Samples a step over all ranks together (default: enough for the steps to see every sample)."""
    learning_rate: float = 1.5e-3
    """Learning rate of the logarithms of the scales at the start; it falls to 0 along a cosine."""
    label_weight: float = 0.1
    """Weight of the cross-entropy with the calibration text's own next tokens; the KL divergence from the
    float model's predictions has the rest of 1."""
    precision: Literal["auto", "float32", "bf16"] = "auto"
    """As --optimize.precision of quantize."""

    @property
    def dtype(self) -> "torch.dtype":
        """What `precision` stands for, once it is resolved."""
        return _dtype(self.precision)


# weight_lr by bits: 2, 3, 4 and more. A coarser grid asks for larger changes of the weight (measured).
DEFAULT = {
    "iterations": 200, "start": "search", "loss": "token", "grid_lr": 5e-3, "weight_lr": (1e-2, 8e-3, 4e-3),
    "fp_mix": 0.0, "optimizer": "rms", "last_block": "predictions", "label_weight": 0.1,
}  # fmt: skip
PRESETS = {
    "default": DEFAULT,
    "light": DEFAULT | {"iterations": 100, "weight_lr": (1.5e-2, 1.2e-2, 6e-3)},
    "best": DEFAULT | {"iterations": 800, "weight_lr": (7.5e-3, 6e-3, 3e-3)},
    "aimet": {
        "iterations": 1500, "start": "minmax", "loss": "squared", "grid_lr": 1e-3, "weight_lr": (5e-4, 5e-4, 5e-4),
        "fp_mix": 0.5, "optimizer": "adam", "last_block": "output", "label_weight": 0.0,
    },
}  # fmt: skip


def resolved(options: OptimizeOptions, bits: int, world_size: int, has_bf16: bool) -> OptimizeOptions:
    """Options in which the preset, the grid, the ranks and the device fill in every value that was not given.

    The micro-batch is left open: it depends on the model.

    Args:
        bits: bits of the grid.
        has_bf16: the device multiplies bfloat16 in hardware.
    """
    defaults = PRESETS[options.preset] | {"batch_size": world_size}
    defaults["weight_lr"] = defaults["weight_lr"][min(max(bits, 2), 4) - 2]
    missing = {name: value for name, value in defaults.items() if getattr(options, name) is None}
    return replace(options, **missing, precision=_precision(options.precision, has_bf16))


def resolved_tuning(options: TuneOptions, num_samples: int, has_bf16: bool) -> TuneOptions:
    """Options in which the number of samples and the device fill in every value that was not given."""
    batch_size = options.batch_size or math.ceil(num_samples / options.steps)
    return replace(options, batch_size=batch_size, precision=_precision(options.precision, has_bf16))


def _precision(asked: str, has_bf16: bool) -> str:
    return asked if asked != "auto" else "bf16" if has_bf16 else "float32"


def _dtype(precision: str) -> "torch.dtype":
    import torch

    return {"float32": torch.float32, "bf16": torch.bfloat16}[precision]
