"""AIMET encodings as JSON: version 1.0.0, and the body of `_torch.encodings` (version 0.6.1 entries).

Names are torch names and lists run in [out, in] order. An activation is named after its module in version 1.0.0
(`model.layers.0.mlp.up_proj.input`; a block's own `input` and `output` are the residual stream; `query`, `key`, `value`
and `context` of an attention module enter and leave its matrix products). In `_torch.encodings` it is what enters or
leaves the module, and attention's four, which belong to no module of AIMET's, are left out. Grids that are each
token's own are in neither: AIMET has no such encoding.

`offset` belongs to the unsigned code in both layouts:
-2^(b-1) on a symmetric grid, `round(min / scale)` on an asymmetric one. Scales here are positive: a full-range grid is
written as the asymmetric one that it equals, of offset 1 - 2^(b-1) where its scale is negative. A two-level grid is
LPBQ in version 1.0.0; version 0.6.1 has plain groups alone, so there it is written as those.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from shardq import __version__
from shardq.errors import CheckpointError
from shardq.files import storage_errors, write_whole
from shardq.quant import affine
from shardq.quant.activation import ActivationGrid
from shardq.quant.quantized import QuantizedLinear
from shardq.quant.spec import QuantSpec

Grids = dict[str, ActivationGrid]
PRODUCER = {"package": "shardq", "version": __version__}


def encoding_v1(name: str, linear: QuantizedLinear) -> dict:
    """One weight's entry of `param_encodings` in version 1.0.0."""
    spec = linear.spec
    scale_OG, offset_OG = _positive_grid(linear)
    entry = _entry_v1(name, scale_OG, offset_OG, spec, "PER_BLOCK" if spec.group_size else "PER_CHANNEL")
    if spec.decompressed_bits:
        entry |= _lpbq(scale_OG, spec)
    return entry | ({"block_size": spec.group_size} if spec.group_size else {})


def _lpbq(scale_OG: Tensor, spec: QuantSpec) -> dict:
    """Version 1.0.0 of a two-level grid; `scale` and `offset` are those of the per-channel grid of `bw` bits."""
    multiplier_OG, channel_O1 = affine.two_levels(scale_OG, spec)
    return {
        "bw": spec.decompressed_bits,
        "scale": channel_O1.flatten().tolist(),
        "offset": [-(1 << (spec.decompressed_bits - 1))] * len(channel_O1),
        "enc_type": "LPBQ",
        "compressed_bw": spec.bits,
        "per_block_int_scale": multiplier_OG.int().flatten().tolist(),
    }


def encoding_torch(linear: QuantizedLinear) -> list[dict]:
    """One weight's entry of `param_encodings` in `_torch.encodings`: a dictionary per channel, or per group row by row.

    AIMET reads `min` and `max` back, not `scale` and `offset`, so they are the float32 ends of the grid in full.
    """
    return _rows_torch(*_positive_grid(linear), linear.spec)


def activations_v1(grids: Grids) -> list[dict]:
    """`activation_encodings` of version 1.0.0, in the order of the grids."""
    return [
        _entry_v1(name, *_unsigned_grid(grid), grid.spec, "PER_TENSOR")
        for name, grid in grids.items()
        if grid.is_static
    ]


def activations_torch(grids: Grids) -> dict[str, dict]:
    """`activation_encodings` of `_torch.encodings`: by module, side, and number of the tensor there."""
    entries: dict[str, dict] = {}
    for name, grid in grids.items():
        module, _, side = name.rpartition(".")
        if grid.is_static and side in ("input", "output"):
            (row,) = _rows_torch(*_unsigned_grid(grid), grid.spec)
            entries.setdefault(module, {})[side] = {"0": row}
    return entries


def _entry_v1(name: str, scale: Tensor, offset: Tensor, spec: QuantSpec, kind: str) -> dict:
    return {
        "name": name,
        "dtype": "INT",
        "bw": spec.bits,
        "is_sym": _is_symmetric(spec),
        "scale": scale.flatten().tolist(),
        "offset": offset.flatten().tolist(),
        "enc_type": kind,
    }


def _rows_torch(scale: Tensor, offset: Tensor, spec: QuantSpec) -> list[dict]:
    columns = (offset * scale, (offset + spec.num_steps) * scale, scale, offset)
    rows = zip(*(column.flatten().tolist() for column in columns), strict=True)
    return [
        {
            "min": low, "max": high, "scale": scale, "offset": offset,
            "bitwidth": spec.bits, "dtype": "int", "is_symmetric": str(_is_symmetric(spec)),
        }
        for low, high, scale, offset in rows
    ]  # fmt: skip


def _is_symmetric(spec: QuantSpec) -> bool:
    return spec.symmetric and not spec.full_range


def _positive_grid(linear: QuantizedLinear) -> tuple[Tensor, Tensor]:
    """Scale, float32, and offset of the unsigned code, int64, of the same grid points in rising order."""
    spec, scale_OG = linear.spec, linear.scale_OG.float()
    offset_OG = torch.where(scale_OG < 0, -spec.qmax, spec.qmin - linear.zero_point_OG)
    return scale_OG.abs(), offset_OG.to(torch.int64)


def _unsigned_grid(grid: ActivationGrid) -> tuple[Tensor, Tensor]:
    """As `_positive_grid`."""
    return torch.tensor([grid.scale]), torch.tensor([grid.spec.qmin - grid.zero_point])


def write_v1(path: Path, entries: Iterable[dict], activations: Grids | None = None) -> None:
    """Write version 1.0.0 whole, one weight's entry in memory at a time."""
    head = {
        "activation_encodings": activations_v1(activations or {}),
        "excluded_layers": [],
        "producer": PRODUCER,
        "version": "1.0.0",
    }
    _write_streamed(path, head, "[", "]", (json.dumps(entry) for entry in entries))


def write_torch(path: Path, entries: Iterable[tuple[str, list[dict]]], activations: Grids | None = None) -> None:
    """Write the body of `_torch.encodings` whole, one weight in memory at a time."""
    items = (f"{json.dumps(name)}: {json.dumps(rows)}" for name, rows in entries)
    _write_streamed(path, {"activation_encodings": activations_torch(activations or {})}, "{", "}", items)


def _write_streamed(path: Path, head: dict, opening: str, closing: str, items: Iterable[str]) -> None:
    def write(aside: Path) -> None:
        with open(aside, "w", encoding="utf-8") as file:
            file.write(json.dumps(head)[:-1] + f', "param_encodings": {opening}')
            for number, item in enumerate(items):
                file.write((",\n" if number else "\n") + item)
            file.write(f"\n{closing}}}\n")

    write_whole(path, write)


def read_v1(path: Path) -> Iterator[dict]:
    """Entries of what `write_v1` wrote, one in memory at a time.

    Raises:
        CheckpointError: the file is cut off, damaged, or another program wrote it.
    """
    yield from _read_streamed(path, "[", "]")


def read_torch(path: Path) -> Iterator[tuple[str, list[dict]]]:
    """Entries, by weight name, of what `write_torch` wrote, one weight in memory at a time.

    Raises:
        CheckpointError: the file is cut off, damaged, or another program wrote it.
    """
    for item in _read_streamed(path, "{", "}"):
        yield from item.items()


def read_activation_entries(path: Path) -> list | dict:
    """The `activation_encodings` of what `write_v1` or `write_torch` wrote.

    Raises:
        CheckpointError: the file is damaged, or another program wrote it.
    """
    try:
        with storage_errors(path), open(path, encoding="utf-8") as file:
            head = file.readline()
            return json.loads(head + {"[": "]}", "{": "}}"}[head[-2:-1]])["activation_encodings"]
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: damaged, or written by another program ({error})") from error


def _read_streamed(path: Path, opening: str, closing: str) -> Iterator:
    """The items of `_write_streamed`, one a line; an item of an object as an object of its own."""
    bare = opening == "["
    try:
        with storage_errors(path), open(path, encoding="utf-8") as file:
            json.loads(file.readline() + closing + "}")
            for line in file:
                if line == f"{closing}}}\n":
                    return
                item = line.rstrip(",\n")
                yield json.loads(item if bare else f"{{{item}}}")
    except ValueError as error:
        raise CheckpointError(f"{path}: damaged, or written by another program ({error})") from error
    raise CheckpointError(f"{path}: cut off; its last line is missing")
