"""Prints what tools/demo.sh measured: perplexity, time, memory and model bytes before and after.

Usage: python tools/demo_table.py --model MODEL --output OUT
"""

import argparse
import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROWS = {"float": "float", "rtn": "round-to-nearest", "quantized": "AdaScale"}
PACKED = (".codes", ".scale", ".zero_point")
MIB = 1 << 20


def fail(message):
    """Stops the program with one line on stderr and exit status 1."""
    raise SystemExit(f"demo_table: {message}")


def read_measurement(output, name):
    """The JSON object that the demo kept beside the output folder as OUTPUT.NAME.json."""
    path = Path(f"{output}.{name}.json")
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        fail(f"{path}: missing; run tools/demo.sh first")
    except json.JSONDecodeError:
        fail(f"{path}: not JSON; delete it and run tools/demo.sh again")


def tensor_bytes(folder):
    """Bytes of each tensor in a folder's safetensors files, by name; reads the headers only."""
    sizes = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with open(path, "rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            sizes[name] = end - start
    if not sizes:
        fail(f"{folder}: holds no safetensors tensors; name a model folder or run tools/demo.sh first")
    return sizes


def model_bytes(model, output):
    """Bytes of the tensors before and after: packed linears from the blocks, the rest from the source."""
    source = tensor_bytes(model)
    blocks = tensor_bytes(Path(output) / "blocks")
    linears = [name.removesuffix(".codes") for name in blocks if name.endswith(".codes")]
    if missing := [name for name in linears if f"{name}.weight" not in source]:
        fail(f"{output}: {missing[0]} is not a linear of {model}; give the model it was made from")
    packed = sum(blocks.get(name + suffix, 0) for name in linears for suffix in PACKED)
    before = sum(source.values())
    return before, before - sum(source[f"{name}.weight"] for name in linears) + packed


def measurement_table(output):
    """A table with one row a model: perplexity, evaluation seconds, peak memory of a rank in MiB."""
    table = Table(title="Demo results")
    table.add_column("model")
    for title in ("perplexity", "seconds", "peak MiB per rank"):
        table.add_column(title, justify="right")
    for name, label in ROWS.items():
        measured = read_measurement(output, name)
        peak = measured["peak_rss_bytes"] / MIB
        table.add_row(label, f"{measured['perplexity']:.3f}", f"{measured['seconds']:.1f}", f"{peak:.0f}")
    return table


def run_line(run):
    """One line on the quantization itself; a loss that was not measured shows as '-'."""
    before, after = ("-" if run[key] is None else f"{run[key]:.4g}" for key in ("loss_before", "loss_after"))
    peak = run["peak_rss_bytes"] / MIB
    cost = f"{run['seconds']:.1f} s, peak {peak:.0f} MiB per rank"
    return f"quantization: {cost}, {run['blocks']} blocks, loss {before} -> {after}"


def main(arguments=None):
    """Command line: --model, the source folder, and --output, the quantized folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of the source model")
    parser.add_argument("--output", required=True, help="folder of the quantized model")
    options = parser.parse_args(arguments)
    before, after = model_bytes(options.model, options.output)
    console = Console(soft_wrap=True, highlight=False)
    console.print(measurement_table(options.output))
    console.print(run_line(read_measurement(options.output, "run")))
    console.print(f"model: {before} -> {after} bytes ({before / after:.2f} times smaller)")


if __name__ == "__main__":
    main()
