"""AIMET encodings as JSON, in each of AIMET's four versions.

Names are torch names and lists run in [out, in] order. An activation is named after its module
(`model.layers.0.mlp.up_proj.input`; a block's own `input` and `output` are the residual stream; `query`, `key`,
`value`, `scores`, `probabilities` and `context` of an attention module enter and leave its matrix products). In 0.6.1
it is what enters or leaves the module, and attention's six, which belong to no module of AIMET's, are left out. Grids
that are each token's own are in none: AIMET has no such encoding.

0.6.1: an object for each scale; `load_encodings` of aimet_torch reads this version alone. 1.0.0: an object for each
weight with its scales in a flat list. 2.0.0 and 2.1.0, alike for weights: `y_scale` flat per-channel, nested [O, G] in
groups. (aimet_torch 2.42, `quantization/affine/encoding.py`.)

`offset` belongs to the unsigned code: -2^(b-1) on a symmetric grid, `round(min / scale)` on an asymmetric one;
`y_zero_point` is 0, and left out, on a symmetric one, whose codes are signed, else `-offset`. Scales are positive: a
full-range grid is written as the asymmetric one that it equals. A two-level grid is LPBQ; 0.6.1 has plain groups
alone, so there it is written as those.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from shardq import __version__
from shardq.errors import CheckpointError, ConfigError
from shardq.files import storage_errors, write_whole
from shardq.formats.integers import integer_grid
from shardq.formats.options import EncodingsVersion
from shardq.quant.activation import ActivationGrid
from shardq.quant.integer_grid import IntegerGrid
from shardq.quant.quantized import QuantizedLinear

Grids = dict[str, ActivationGrid]
Version = EncodingsVersion

PRODUCER = {"package": "shardq", "version": __version__}
LAYOUTS: dict[Version, tuple[str, str]] = {  # key of a file's items, the brackets around them
    "0.6.1": ("param_encodings", "{}"),
    "1.0.0": ("param_encodings", "[]"),
    "2.0.0": ("encodings", "[]"),
    "2.1.0": ("encodings", "[]"),
}
BYTES_A_SCALE: dict[Version, int] = {"0.6.1": 160, "1.0.0": 26, "2.0.0": 22, "2.1.0": 22}  # as written, about
LARGEST_BYTES = 4 * 10**9  # of a file; a program that loads it takes several times as much memory


def fits(version: Version, num_scales: int) -> bool:
    """Whether a file with so many scales is one that programs can be expected to load."""
    return num_scales * BYTES_A_SCALE[version] <= LARGEST_BYTES


def check_size(version: Version, num_scales: int) -> None:
    """Check that a version can hold so many scales.

    Raises:
        ConfigError: the file would be too large; says how large.
    """
    if not fits(version, num_scales):
        others = [other for other in LAYOUTS if fits(other, num_scales)]
        advice = (
            f"choose --aimet.version {' or '.join(others)}" if others else "quantize in larger groups, or per-channel"
        )
        raise ConfigError(f"aimet.version: {version}: {size_of(version, num_scales)}; {advice}")


def size_of(version: Version, num_scales: int) -> str:
    """In words, what a file with so many scales would take and may take."""
    size, limit = num_scales * BYTES_A_SCALE[version] / 1e9, LARGEST_BYTES / 1e9
    return f"{num_scales} scales would make about {size:.1f} GB of JSON, of which a program loads {limit:.1f} at most"


def item_of(version: Version, name: str, linear: QuantizedLinear) -> dict:
    """What a file of a version holds of one weight: `{name: [...]}` in 0.6.1, else an object that has its `name`."""
    scale_OG, zero_point_OG, positive = linear.positive_grid
    grid = integer_grid("aimet", positive)
    scale_OG, offset_OG = scale_OG.float(), (grid.qmin - zero_point_OG).to(torch.int64)
    if version == "0.6.1":
        return {name: _objects(scale_OG, offset_OG, grid)}
    block_size = {"block_size": grid.group_size} if grid.group_size else {}
    if version == "1.0.0":
        item = _entry_v1(name, scale_OG, offset_OG, grid, "PER_BLOCK" if grid.group_size else "PER_CHANNEL")
        return item | (_lpbq_v1(scale_OG, grid) if grid.decompressed_bits else {}) | block_size
    if grid.decompressed_bits:
        return {"name": name, "output_dtype": _dtype(grid), "axis": 1} | _lpbq_v2(version, scale_OG, grid) | block_size
    if not grid.group_size:
        scale_OG, offset_OG = scale_OG.flatten(), offset_OG.flatten()
    return _entry_v2(name, scale_OG, offset_OG, grid) | {"axis": 1 if grid.group_size else 0} | block_size


def activations_of(version: Version, grids: Grids) -> list[dict] | dict[str, dict]:
    """Encodings of activations: objects that have their `name`, in 0.6.1 by module, side, and number of the tensor."""
    static = {name: grid for name, grid in grids.items() if grid.is_static}
    if version == "0.6.1":
        entries: dict[str, dict] = {}
        for name, grid in static.items():
            module, _, side = name.rpartition(".")
            if side in ("input", "output"):
                (entry,) = _objects(*_unsigned(grid), grid.levels)
                entries.setdefault(module, {})[side] = {"0": entry}
        return entries
    if version == "1.0.0":
        return [_entry_v1(name, *_unsigned(grid), grid.levels, "PER_TENSOR") for name, grid in static.items()]
    scalars = {name: [one.squeeze() for one in _unsigned(grid)] for name, grid in static.items()}
    return [_entry_v2(name, scale, offset, static[name].levels) for name, (scale, offset) in scalars.items()]


def _unsigned(grid: ActivationGrid) -> tuple[Tensor, Tensor]:
    """Scale [1] and offset [1] of the unsigned code of a static grid."""
    assert grid.zero_point is not None
    return torch.tensor([grid.scale]), torch.tensor([grid.levels.qmin - grid.zero_point])


def _dtype(grid: IntegerGrid) -> str:
    return f"{'' if grid.symmetric else 'u'}int{grid.bits}"


def _objects(scale: Tensor, offset: Tensor, grid: IntegerGrid) -> list[dict]:
    """Version 0.6.1: one object for each scale, row by row.

    AIMET reads `min` and `max` back, not `scale` and `offset`, so they are the float32 ends of the grid in full.
    """
    columns = (offset * scale, (offset + grid.num_steps) * scale, scale, offset)
    rows = zip(*(column.flatten().tolist() for column in columns), strict=True)
    return [
        {
            "min": low, "max": high, "scale": scale, "offset": offset,
            "bitwidth": grid.bits, "dtype": "int", "is_symmetric": str(grid.symmetric),
        }
        for low, high, scale, offset in rows
    ]  # fmt: skip


def _entry_v1(name: str, scale: Tensor, offset: Tensor, grid: IntegerGrid, kind: str) -> dict:
    return {
        "name": name,
        "dtype": "INT",
        "bw": grid.bits,
        "is_sym": grid.symmetric,
        "scale": scale.flatten().tolist(),
        "offset": offset.flatten().tolist(),
        "enc_type": kind,
    }


def _entry_v2(name: str, scale: Tensor, offset: Tensor, grid: IntegerGrid) -> dict:
    entry = {"name": name, "output_dtype": _dtype(grid), "y_scale": scale.tolist()}
    if not grid.symmetric and offset.any():
        entry["y_zero_point"] = (-offset).tolist()
    return entry


def _lpbq_v1(scale_OG: Tensor, grid: IntegerGrid) -> dict:
    """A two-level grid; `scale` and `offset` are those of the per-channel grid of `bw` bits."""
    assert grid.decompressed_bits is not None
    multiplier_OG, channel_O1 = grid.two_levels(scale_OG)
    return {
        "bw": grid.decompressed_bits,
        "scale": channel_O1.flatten().tolist(),
        "offset": [-(1 << (grid.decompressed_bits - 1))] * len(channel_O1),
        "enc_type": "LPBQ",
        "compressed_bw": grid.bits,
        "per_block_int_scale": multiplier_OG.int().flatten().tolist(),
    }


def _lpbq_v2(version: Version, scale_OG: Tensor, grid: IntegerGrid) -> dict:
    multiplier_OG, channel_O1 = grid.two_levels(scale_OG)
    multipliers = multiplier_OG.int().tolist()
    if version == "2.0.0":
        return {"per_block_int_scale": multipliers, "per_channel_float_scale": channel_O1.tolist()}
    return {"y_scale": {"x": multipliers, "x_scale": channel_O1.flatten().tolist(), "axis": 0}}


def write(path: Path, version: Version, linears: Mapping[str, QuantizedLinear], grids: Grids | None = None) -> None:
    """Write the encodings of the weights of linears, and of activations, by full name, to a file that appears whole."""
    grids = grids or {}
    items: Iterable[dict] = (item_of(version, f"{name}.weight", linear) for name, linear in linears.items())
    if LAYOUTS[version][0] == "encodings":  # one list of both
        items = chain(cast(list[dict], activations_of(version, grids)), items)
    _write_lines(path, version, (_line(version, item) for item in items), grids)


def merge(path: Path, version: Version, parts: Iterable[Path], grids: Grids | None = None) -> None:
    """Write all items of some files of a version to one that appears whole; one item in memory at a time.

    Args:
        grids: of the activations of all parts.

    Raises:
        CheckpointError: as `read`.
    """
    _write_lines(path, version, (line for part in parts for line in _read_lines(part, version)), grids or {})


def read(path: Path, version: Version) -> Iterator[dict]:
    """The items, as `item_of` makes them, of a file that `write` or `merge` wrote, one in memory at a time.

    Raises:
        CheckpointError: the file is cut off, damaged, or another program wrote it.
    """
    is_object = LAYOUTS[version][1] == "{}"
    try:
        for line in _read_lines(path, version):
            yield json.loads(f"{{{line}}}" if is_object else line)
    except ValueError as error:
        raise _damaged(path, error) from error


def _line(version: Version, item: dict) -> str:
    """An item as a line of its file; that of an object is a key and its value."""
    return json.dumps(item)[1:-1] if LAYOUTS[version][1] == "{}" else json.dumps(item)


def read_activations(path: Path, version: Version) -> list[dict] | dict[str, dict]:
    """The `activation_encodings` of a file of version 0.6.1 or 1.0.0.

    Raises:
        CheckpointError: the file is damaged, or another program wrote it.
    """
    try:
        with storage_errors(path, "read"), open(path, encoding="utf-8") as file:
            return json.loads(file.readline() + LAYOUTS[version][1][1] + "}")["activation_encodings"]
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(path, error) from error


def _write_lines(path: Path, version: Version, lines: Iterable[str], grids: Grids) -> None:
    key, brackets = LAYOUTS[version]
    opening, closing = brackets[0], brackets[1]
    head: dict = {"producer": PRODUCER, "version": version}
    if key == "param_encodings":
        head = {"activation_encodings": activations_of(version, grids), "excluded_layers": [], **head}

    def write_aside(aside: Path) -> None:
        with open(aside, "w", encoding="utf-8") as file:
            file.write(json.dumps(head)[:-1] + f', "{key}": {opening}')
            for number, line in enumerate(lines):
                file.write((",\n" if number else "\n") + line)
            file.write(f"\n{closing}}}\n")

    write_whole(path, write_aside)


def _read_lines(path: Path, version: Version) -> Iterator[str]:
    closing = LAYOUTS[version][1][1]
    try:
        with storage_errors(path, "read"), open(path, encoding="utf-8") as file:
            if json.loads(file.readline() + closing + "}")["version"] != version:
                raise ValueError(f"not version {version}")
            for line in file:
                if line == f"{closing}}}\n":
                    return
                yield line.rstrip(",\n")
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(path, error) from error
    raise CheckpointError(f"{path}: cut off; its last line is missing")


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path}: damaged, or written by another program ({error})")
