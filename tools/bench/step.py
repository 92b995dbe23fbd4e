#!/usr/bin/env python
"""Times one AdaScale step on a decoder block of random weights, against this machine's matrix-multiply peak.

    python tools/bench/step.py --shape smollm2 --tokens 512 --iterations 30

The last line is JSON: milliseconds a step, its GFLOP/s, the peak's, their ratio, bytes saved for backward a weight.
"""

import argparse
import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from shardq.compiling import compiler, eager, why_not
from shardq.devices import multiplies_bf16
from shardq.logs import peak_device_bytes
from shardq.matrix import matrices_in
from shardq.model.attention import NAME
from shardq.optimize.block_quantizer import BlockQuantizer
from shardq.optimize.distill import distill
from shardq.optimize.options import OptimizeOptions, resolved
from shardq.optimize.stepper import LocalStepper
from shardq.quant.adascale import Kernels
from shardq.quant.integer_grid import IntegerGrid
from shardq.training.memory import saved_tensors
from shardq.training.trainer import block_loss

SHAPES = {"smollm2": "576x1536x9x3", "llama3-8b": "4096x14336x32x8", "llama3-70b": "8192x28672x64x8"}
PROFILED_STEPS = 10
PROFILE_KINDS = {  # pattern of an operation's or a GPU kernel's name -> what it is called in the profile
    r"^aten::(mm|addmm)$|nvjet|gemm|cutlass": "matrix multiplies of linears",
    r"^aten::(bmm|baddbmm|_scaled_dot_product.*)$|flash|fmha": "matrix multiplies of attention",
    r"CompiledFxGraph|^triton": "fused kernels",
    r"[Aa]dam|[Aa]dagrad": "optimizer",
}
SQUARE = 4096  # size of the matrices whose product counts as the peak, beside the block's own shapes


@dataclass(frozen=True)
class Shape:
    """A Llama block: channels of the residual stream and of the MLP, query heads, key and value heads."""

    hidden: int
    intermediate: int
    num_heads: int
    num_kv_heads: int

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Output and input channels of the linears by name."""
        head = self.hidden // self.num_heads
        kv = head * self.num_kv_heads
        return {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (kv, self.hidden),
            "self_attn.v_proj": (kv, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }

    @property
    def num_weights(self) -> int:
        """Weights of the linears."""
        return sum(outputs * inputs for outputs, inputs in self.linears.values())

    @property
    def num_trained(self) -> int:
        """Parameters of AdaScale per-channel: s2 of every weight; beta, gamma and s3 of every output channel."""
        return self.num_weights + 3 * sum(outputs for outputs, _ in self.linears.values())

    def step_flop(self, num_tokens: int) -> int:
        """Floating-point operations of a step's matrix multiplies.

        Forward and both backward products of every linear, without the gradient of the block's input that nobody
        needs (q, k, v); two products forward and four backward for attention, counted in full, not as causal.
        """
        first = sum(o * i for name, (o, i) in self.linears.items() if name.endswith(("q_proj", "k_proj", "v_proj")))
        attention = 6 * 2 * num_tokens**2 * self.hidden
        return 2 * num_tokens * (3 * self.num_weights - first) + attention


def parse_shape(text: str) -> Shape:
    """A named shape, or HIDDENxINTERMEDIATExHEADSxKV."""
    written = SHAPES.get(text, text)
    if not re.fullmatch(r"\d+x\d+x\d+x\d+", written):
        raise argparse.ArgumentTypeError(f"{text!r} is neither {', '.join(SHAPES)} nor HIDDENxINTERMEDIATExHEADSxKV")
    shape = Shape(*map(int, written.split("x")))
    if shape.hidden % shape.num_heads or shape.num_heads % shape.num_kv_heads:
        raise argparse.ArgumentTypeError(f"{text!r}: heads must divide the hidden size, kv heads the heads")
    return shape


def make_block(shape: Shape, num_tokens: int, device: torch.device) -> tuple[nn.Module, dict[str, Tensor], dict]:
    """A float32 block, its weights as a bfloat16 checkpoint holds them, and its keyword arguments."""
    config = LlamaConfig(
        hidden_size=shape.hidden, intermediate_size=shape.intermediate, num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads, head_dim=shape.hidden // shape.num_heads, num_hidden_layers=1,
        attn_implementation=NAME,
    )  # fmt: skip
    with torch.device(device):
        block = LlamaDecoderLayer(config, 0).eval().requires_grad_(False)
        rotary = LlamaRotaryEmbedding(config)
        position_ids = torch.arange(num_tokens)[None]
        embeddings = rotary(torch.empty(1, num_tokens, shape.hidden), position_ids)
    source = {name: tensor.bfloat16() for name, tensor in block.state_dict().items()}
    return block, source, {"position_embeddings": embeddings, "position_ids": position_ids, "attention_mask": None}


def matmul_peak(shape: Shape, num_tokens: int, dtype: torch.dtype, device: torch.device) -> float:
    """Best rate of a matrix multiply on this machine in GFLOP/s, over the block's shapes and a large square."""
    shapes = {(num_tokens, inputs, outputs) for outputs, inputs in shape.linears.values()} | {(SQUARE,) * 3}
    best = 0.0
    for rows, inner, columns in shapes:
        left = torch.randn(rows, inner, device=device).to(dtype)
        right = torch.randn(inner, columns, device=device).to(dtype)
        seconds = min(_timed(lambda left=left, right=right: left @ right, device) for _ in range(5))
        best = max(best, 2 * rows * inner * columns / seconds / 1e9)
    return best


def _timed(work: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    work()
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def saved_bytes(quantizer: BlockQuantizer, shape: Shape) -> dict[str, float]:
    """Bytes that quantizing the weights saves for backward: a weight's own, and those that its row shares."""
    sizes = {linear.rows.numel() for linear in quantizer.quantizers}
    saved = saved_tensors(quantizer)
    of_weights = sum(tensor.untyped_storage().nbytes() for tensor in saved if tensor.numel() in sizes)
    of_all = sum(tensor.untyped_storage().nbytes() for tensor in saved)
    num_rows = sum(len(linear.rows) for linear in quantizer.quantizers)
    return {
        "saved_bytes_per_weight": round(of_weights / shape.num_weights, 3),
        "saved_bytes_per_row": round((of_all - of_weights) / num_rows, 1),
    }


def profile_shares(work: Callable[[], None], device: torch.device) -> dict[str, dict[str, float]]:
    """Where the device's time goes, in milliseconds a step, by kind of operation."""
    on_gpu = device.type == "cuda"
    activity = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profiler:
        work()
    kinds = dict.fromkeys(PROFILE_KINDS.values(), 0.0) | {"other": 0.0}
    for event in profiler.key_averages():
        kind = next((kind for pattern, kind in PROFILE_KINDS.items() if re.search(pattern, event.key)), "other")
        microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        kinds[kind] += microseconds / 1e3 / PROFILED_STEPS
    return {"profile_ms": {kind: round(milliseconds, 2) for kind, milliseconds in kinds.items()}}


def measure(arguments: argparse.Namespace, device: torch.device) -> dict:
    """Run the steps and give the figures."""
    shape, tokens = arguments.shape, arguments.tokens
    options = resolved(
        OptimizeOptions(iterations=arguments.iterations, precision=arguments.precision),
        bits=arguments.bits,
        world_size=1,
        has_bf16=multiplies_bf16(device),
    )
    compiled = eager if arguments.compile == "off" or why_not(device) else compiler(device, print)
    block, source, kwargs = make_block(shape, tokens, device)
    kernels = Kernels(*(compiled(kernel, True) for kernel in Kernels()))
    grid = IntegerGrid(bits=arguments.bits, group_size=None if arguments.group_size == -1 else arguments.group_size)
    quantizer = BlockQuantizer(block, dict.fromkeys(matrices_in(block), grid), "adascale", kernels, options.dtype)
    stepper = LocalStepper(quantizer, options)
    quantizer.start(source)
    inputs, targets = torch.randn(2, arguments.batch_size, tokens, shape.hidden, device=device)
    loss = compiled(block_loss, False)
    times = []

    def batches(count: int) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(count):
            _synchronize(device)
            times.append(time.perf_counter())
            yield inputs, targets
        _synchronize(device)
        times.append(time.perf_counter())

    def train(count: int) -> None:
        stepper.start(count)
        for _ in distill(
            lambda some, wanted: loss(block, some, wanted, (), kwargs, options.dtype)[0],
            quantizer, stepper, batches(count), arguments.micro_batch or arguments.batch_size,
        ):  # fmt: skip
            pass

    start = time.perf_counter()
    train(2)
    warm_up = time.perf_counter() - start
    times.clear()
    train(arguments.iterations)
    measured = list(times)
    shares = profile_shares(lambda: train(PROFILED_STEPS), device) if arguments.profile else {}
    steps = sorted(after - before for before, after in zip(measured, measured[1:], strict=False))
    median = steps[len(steps) // 2]
    flop = arguments.batch_size * shape.step_flop(tokens)
    peak = matmul_peak(shape, tokens, options.dtype, device)
    return {
        "ms_per_step": round(1e3 * median, 3),
        "ms_per_step_best": round(1e3 * steps[0], 3),
        "gflops": round(flop / median / 1e9, 1),
        "matmul_peak_gflops": round(peak, 1),
        "share_of_peak": round(flop / median / 1e9 / peak, 4),
        **saved_bytes(quantizer, shape),
        "gflop_per_step": round(flop / 1e9, 2),
        "precision": options.precision,
        "compiled": compiled is not eager,
        "warm_up_seconds": round(warm_up, 1),
        "peak_bytes": peak_device_bytes(device),
        "threads": torch.get_num_threads(),
        **shares,
    }


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shape", type=parse_shape, default="smollm2", help="smollm2, llama3-8b, llama3-70b or HxIxNxK"
    )
    parser.add_argument("--tokens", type=int, default=512, help="tokens a sample")
    parser.add_argument("--iterations", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=1, help="samples a step")
    parser.add_argument("--micro-batch", type=int, help="samples at once (default: all of a step)")
    parser.add_argument("--precision", choices=["auto", "float32", "bf16"], default="auto")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=-1)
    parser.add_argument("--profile", action="store_true", help="also show where a step's time goes")
    parser.add_argument("--compile", choices=["auto", "off"], default="auto")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    print(json.dumps(measure(arguments, torch.device(arguments.device))))


if __name__ == "__main__":
    main()
