#!/usr/bin/env python
"""Expected time of a run on a class of GPU, from its FLOPs and bytes: prints a table in Markdown.

    python tools/bench/expected.py --iterations 200 --samples 128 --tokens 2048

Nothing here is measured: a step's matrix multiplies at a share of the data sheet's dense bf16 rate, its elementwise
passes over the weights and activations at a share of the memory bandwidth, one after the other.
"""

import argparse
from dataclasses import dataclass

from step import SHAPES, Shape, parse_shape

COMPUTE_SHARE, BANDWIDTH_SHARE = 0.6, 0.8
# A weight's bytes a step: quantize (read W 2, s2 4, write W^ 2), back (read dW^ 2, W 2, s2 4, write ds2 4), step
# (read s2, ds2 and the mean square, write s2 and the mean square: 20).
WEIGHT_BYTES_A_STEP = 8 + 12 + 20
# An activation's bytes forward and backward with fused norms, rotary, SiLU and residuals: values read or written.
HIDDEN_VALUES, INTERMEDIATE_VALUES, ACTIVATION_BYTES = 24, 12, 3  # between 2 (bf16) and 4 (float32) bytes a value
PASSES = 2  # fp pass, quant pass


@dataclass(frozen=True)
class Gpu:
    """Data-sheet figures: dense bf16 TFLOP/s, memory bandwidth in TB/s, memory in GB."""

    name: str
    tflops: float
    bandwidth: float
    memory: int


GPUS = (
    Gpu("RTX 4090", 165, 1.01, 24),
    Gpu("L40S", 362, 0.86, 48),
    Gpu("A100 80GB", 312, 2.04, 80),
    Gpu("H100 SXM", 989, 3.35, 80),
    Gpu("H200", 989, 4.8, 141),
)
MODELS = {"8B": ("llama3-8b", 32), "70B": ("llama3-70b", 80)}


def step_seconds(shape: Shape, num_tokens: int, gpu: Gpu) -> float:
    """Seconds of one optimizer step on one sample."""
    values = num_tokens * (HIDDEN_VALUES * shape.hidden + INTERMEDIATE_VALUES * shape.intermediate)
    moved = WEIGHT_BYTES_A_STEP * shape.num_weights + ACTIVATION_BYTES * values
    return shape.step_flop(num_tokens) / (COMPUTE_SHARE * gpu.tflops * 1e12) + moved / (
        BANDWIDTH_SHARE * gpu.bandwidth * 1e12
    )


def run_seconds(shape: Shape, num_blocks: int, arguments: argparse.Namespace, gpu: Gpu) -> float:
    """Seconds of all blocks on one GPU: training and passes; reading and writing are hidden behind them."""
    forward = 2 * arguments.tokens * shape.num_weights + 4 * arguments.tokens**2 * shape.hidden
    passes = PASSES * arguments.samples * forward / (COMPUTE_SHARE * gpu.tflops * 1e12)
    return num_blocks * (arguments.iterations * step_seconds(shape, arguments.tokens, gpu) + passes)


def state_gigabytes(shape: Shape) -> float:
    """One block's training state on one GPU: source twice (the next is read ahead), s2, its gradient, mean square."""
    return shape.num_weights * (2 * 2 + 4 + 4 + 4) / 1e9


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=2048)
    arguments = parser.parse_args()
    print("| GPU | model | ms a step | whole run | training state of a block |\n| --- | --- | --- | --- | --- |")
    for gpu in GPUS:
        for model, (name, num_blocks) in MODELS.items():
            shape = parse_shape(SHAPES[name])
            seconds = run_seconds(shape, num_blocks, arguments, gpu)
            state = state_gigabytes(shape)
            fits = f"{state:.1f} GB" if state < 0.8 * gpu.memory else f"{state:.1f} GB: too large for one"
            print(f"| {gpu.name} | {model} | {1e3 * step_seconds(shape, arguments.tokens, gpu):.0f} "
                  f"| {seconds / 60:.0f} min | {fits} |")  # fmt: skip


if __name__ == "__main__":
    main()
