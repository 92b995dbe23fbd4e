"""What the workers of `peers.py` share: options, a clock of optimizer steps, checks, the checkpoint and the report.

It runs in the environments of the peers, so it needs nothing but torch and safetensors.
"""

import argparse
import json
import re
import shutil
import statistics
import time
from collections.abc import Iterable
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook


def make_parser(description: str) -> argparse.ArgumentParser:
    """The options that every worker takes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", type=Path, required=True, help="folder of the float model")
    parser.add_argument("--ids", type=Path, required=True, help="safetensors file of token ids [samples, length]")
    parser.add_argument("--column", required=True, help="the file's tensor of calibration ids")
    parser.add_argument("--samples", type=int, required=True, help="calibration samples")
    parser.add_argument("--bits", type=int, default=4, help="bits a weight (default 4)")
    parser.add_argument("--group-size", type=int, default=-1, help="input channels a scale; -1: per-channel (default)")
    parser.add_argument("--threads", type=int, required=True, help="threads of torch")
    parser.add_argument("--output", type=Path, required=True, help="folder for the fake-quantized checkpoint")
    return parser


def make_tuning_parser(description: str) -> argparse.ArgumentParser:
    """The options of a worker that takes optimizer steps."""
    parser = make_parser(description)
    parser.add_argument("--iterations", type=int, required=True, help="optimizer steps a block, of one sample each")
    return parser


def read_samples(path: Path, column: str, num_samples: int) -> list[Tensor]:
    """The first token id sequences of a file, each [1, length], int64."""
    with safe_open(path, framework="pt") as file:
        ids_NT = file.get_slice(column)[:num_samples].long()
    return list(ids_NT.split(1))


class StepClock:
    """Notes, while it is entered, when optimizers of one class finish a step; a new optimizer is a new block.

    Attributes:
        blocks: for each block the times at which its steps ended, in seconds.
    """

    def __init__(self, optimizer_class: str):
        self.blocks: list[list[float]] = []
        self._class = optimizer_class
        self._of_optimizer: WeakKeyDictionary[torch.optim.Optimizer, list[float]] = WeakKeyDictionary()

    def __enter__(self) -> "StepClock":
        self._hook = register_optimizer_step_post_hook(self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()

    def _note(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        if type(optimizer).__name__ != self._class:
            return
        if optimizer not in self._of_optimizer:
            self.blocks.append([])
            self._of_optimizer[optimizer] = self.blocks[-1]
        self._of_optimizer[optimizer].append(time.perf_counter())

    def check(self, num_blocks: int, iterations: int) -> None:
        """Exit with one line unless every block was trained for the given number of steps."""
        counts = [len(times) for times in self.blocks]
        if counts != [iterations] * num_blocks:
            raise SystemExit(
                f"{self._class}: steps a block were {counts}, not {iterations} in each of {num_blocks} blocks; "
                "the peer does not know this architecture, or its version differs"
            )


def step_statistics(blocks: Iterable[list[float]]) -> dict[str, object]:
    """Seconds between consecutive steps: median and mean over all blocks, and the median of each block.

    The time before a block's first step is left out: it holds the change of blocks and, in the first, compilation.

    Args:
        blocks: for each block the times at which its steps ended, in seconds.
    """
    differences = [[later - earlier for earlier, later in zip(times, times[1:], strict=False)] for times in blocks]
    differences = [block for block in differences if block]
    everything = [seconds for block in differences for seconds in block]
    if not everything:
        return {"seconds_per_step_median": None, "seconds_per_step_mean": None, "seconds_per_step_by_block": []}
    return {
        "seconds_per_step_median": statistics.median(everything),
        "seconds_per_step_mean": statistics.fmean(everything),
        "seconds_per_step_by_block": [round(statistics.median(block), 6) for block in differences],
    }


def peak_rss_bytes() -> int:
    """Largest resident memory of this process so far, in bytes; what the launcher held is not in it."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1)) * 1024


def linears_of(blocks: Iterable[nn.Module], prefix: str) -> dict[str, nn.Linear]:
    """The linears of decoder blocks by the checkpoint's names, which are `prefix.INDEX.NAME`."""
    return {
        f"{prefix}.{block_index}.{name}": module
        for block_index, block in enumerate(blocks)
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear)
    }


@torch.no_grad()
def check_grids(linears: dict[str, Tensor], bits: int, group_size: int) -> None:
    """Exit with one line unless the weights of every scale take at most 2**bits values.

    Args:
        linears: the fake-quantized weight [out, in] of each linear by its name.
        group_size: input channels a scale; -1: all.
    """
    for name, weight_OI in linears.items():
        groups_OGI = weight_OI.unflatten(1, (-1, weight_OI.shape[1] if group_size == -1 else group_size))
        most = 1 + groups_OGI.sort(-1).values.diff(dim=-1).ne(0).sum(-1).max().item()
        if most > 2**bits:
            raise SystemExit(
                f"{name}: {most} values share a scale, more than {bits} bits hold; the peer did not quantize it so, "
                "or its version differs"
            )


@torch.no_grad()
def write_checkpoint(source: Path, output: Path, linears: dict[str, Tensor]) -> None:
    """Write a float32 copy of a checkpoint with some weights replaced, a shard for each shard of the source.

    Args:
        linears: the new weight of each linear by its name, without `.weight`.

    Raises:
        SystemExit: the source lacks one of the linears.
    """
    output.mkdir(parents=True, exist_ok=True)
    left, weight_map = dict(linears), {}
    for shard in sorted(source.glob("*.safetensors")):
        tensors = {}
        with safe_open(shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  a safe_open is no mapping
                weight = left.pop(name.removesuffix(".weight"), None)
                tensors[name] = (file.get_tensor(name) if weight is None else weight).float().contiguous()
        save_file(tensors, output / shard.name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, shard.name)
    if left:
        raise SystemExit(f"{source}: no weight of {next(iter(left))}; its names differ from the model's modules")
    (output / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for path in source.glob("*.json"):
        if not path.name.endswith(".index.json"):
            shutil.copyfile(path, output / path.name)
    config = json.loads((source / "config.json").read_text())
    config = {key: value for key, value in config.items() if key != "torch_dtype"} | {"dtype": "float32"}
    (output / "config.json").write_text(json.dumps(config, indent=2))


def report(facts: dict[str, object]) -> None:
    """Print a worker's result as the last line of standard output."""
    print(json.dumps(facts), flush=True)
