#!/usr/bin/env python
"""Token ids of texts, in one safetensors file that the benchmarks and `--calib.dataset` take.

    python tools/bench/make_ids.py ids.safetensors --model DIR calib_ids=calibration.jsonl:96x512 \\
        eval_ids=heldout.jsonl:16x1024 sotu_ids=sotu.txt:16x1024

A column is NAME=TEXT:SAMPLESxLENGTH; a text is what `--calib.dataset` takes, cut as a run cuts it.
"""

import argparse
import re
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from shardq.calib.options import TextOptions  # noqa: E402  the checkout comes first on the path
from shardq.calib.tokens import load_tokens  # noqa: E402
from shardq.errors import ShardQError  # noqa: E402

INT32 = torch.iinfo(torch.int32).max


def column(text: str) -> tuple[str, TextOptions]:
    """A column's name and the text, number and length of its samples."""
    match = re.fullmatch(r"(\w+)=(.+):(\d+)x(\d+)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r}: give NAME=TEXT:SAMPLESxLENGTH, such as eval_ids=b.txt:16x1024")
    name, path, samples, length = match.groups()
    return name, TextOptions(dataset=path, samples=int(samples), sequence_length=int(length))


def main() -> None:
    """Tokenize every column and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("columns", nargs="+", type=column, help="NAME=TEXT:SAMPLESxLENGTH")
    parser.add_argument("--model", type=Path, required=True, help="folder whose tokenizer is used")
    options = parser.parse_args()
    try:
        columns = {name: load_tokens(text, options.model, INT32).int() for name, text in options.columns}
    except ShardQError as error:
        raise SystemExit(f"make_ids: {error}") from None
    save_file(columns, options.output)
    for name, ids in columns.items():
        print(f"{name} {list(ids.shape)}")


if __name__ == "__main__":
    main()
