"""AIMET encodings of weights as JSON, in each of AIMET's four versions.

Names are torch names and lists run in [out, in] order. 0.6.1: an object for each scale; `load_encodings` of aimet_torch
reads this version alone. 1.0.0: an object for each weight with its scales in a flat list. 2.0.0 and 2.1.0, alike for
weights: `y_scale` flat per-channel, nested [O, G] in groups. (aimet_torch 2.42, `quantization/affine/encoding.py`.)

`offset` belongs to the unsigned code: -2^(b-1) on a symmetric grid, `round(min / scale)` on an asymmetric one;
`y_zero_point` is 0, and left out, on a symmetric one, whose codes are signed, else `-offset`. Scales are positive: a
full-range grid is written as the asymmetric one that it equals.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from shardq import __version__
from shardq.errors import CheckpointError, ConfigError
from shardq.files import storage_errors, write_whole
from shardq.quant.quantized import QuantizedLinear

Version = Literal["0.6.1", "1.0.0", "2.0.0", "2.1.0"]

PRODUCER = {"package": "shardq", "version": __version__}
# Head of a file, the key of its items, the brackets around them.
_LEGACY_HEAD = {"excluded_layers": [], "producer": PRODUCER}
LAYOUTS: dict[Version, tuple[dict, str, str]] = {
    "0.6.1": ({"activation_encodings": {}, **_LEGACY_HEAD}, "param_encodings", "{}"),
    "1.0.0": ({"activation_encodings": [], **_LEGACY_HEAD}, "param_encodings", "[]"),
    "2.0.0": ({"producer": PRODUCER}, "encodings", "[]"),
    "2.1.0": ({"producer": PRODUCER}, "encodings", "[]"),
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
    positive = linear.with_positive_scales()
    spec, scale_OG = positive.spec, positive.scale_OG.float()
    offset_OG = (spec.qmin - positive.zero_point_OG).to(torch.int64)
    if version == "0.6.1":
        return {name: _objects(scale_OG, offset_OG, spec.bits, spec.num_steps, spec.symmetric)}
    if version == "1.0.0":
        item = {
            "name": name,
            "dtype": "INT",
            "bw": spec.bits,
            "is_sym": spec.symmetric,
            "scale": scale_OG.flatten().tolist(),
            "offset": offset_OG.flatten().tolist(),
            "enc_type": "PER_BLOCK" if spec.group_size else "PER_CHANNEL",
        }
    else:
        as_stored = Tensor.tolist if spec.group_size else lambda values_OG: values_OG.flatten().tolist()
        item = {
            "name": name,
            "output_dtype": f"{'' if spec.symmetric else 'u'}int{spec.bits}",
            "y_scale": as_stored(scale_OG),
            "axis": 1 if spec.group_size else 0,
        }
        if not spec.symmetric and offset_OG.any():
            item["y_zero_point"] = as_stored(-offset_OG)
    return item | ({"block_size": spec.group_size} if spec.group_size else {})


def _objects(scale_OG: Tensor, offset_OG: Tensor, bits: int, num_steps: int, is_symmetric: bool) -> list[dict]:
    """Version 0.6.1: one object for each scale, row by row.

    AIMET reads `min` and `max` back, not `scale` and `offset`, so they are the float32 ends of the grid in full.
    """
    columns = (offset_OG * scale_OG, (offset_OG + num_steps) * scale_OG, scale_OG, offset_OG)
    rows = zip(*(column.flatten().tolist() for column in columns), strict=True)
    return [
        {
            "min": low, "max": high, "scale": scale, "offset": offset,
            "bitwidth": bits, "dtype": "int", "is_symmetric": str(is_symmetric),
        }
        for low, high, scale, offset in rows
    ]  # fmt: skip


def write(path: Path, version: Version, linears: dict[str, QuantizedLinear]) -> None:
    """Write the encodings of the weights of linears, by full name, to a file that appears whole."""
    items = (item_of(version, f"{name}.weight", linear) for name, linear in linears.items())
    _write_lines(path, version, (_line(version, item) for item in items))


def merge(path: Path, version: Version, parts: Iterable[Path]) -> None:
    """Write all items of some files of a version to one that appears whole; one item in memory at a time.

    Raises:
        CheckpointError: as `read`.
    """
    _write_lines(path, version, (line for part in parts for line in _read_lines(part, version)))


def read(path: Path, version: Version) -> Iterator[dict]:
    """The items, as `item_of` makes them, of a file that `write` or `merge` wrote, one in memory at a time.

    Raises:
        CheckpointError: the file is cut off, damaged, or another program wrote it.
    """
    is_object = LAYOUTS[version][2] == "{}"
    try:
        for line in _read_lines(path, version):
            yield json.loads(f"{{{line}}}" if is_object else line)
    except ValueError as error:
        raise _damaged(path, error) from error


def _line(version: Version, item: dict) -> str:
    """An item as a line of its file; that of an object is a key and its value."""
    return json.dumps(item)[1:-1] if LAYOUTS[version][2] == "{}" else json.dumps(item)


def _write_lines(path: Path, version: Version, lines: Iterable[str]) -> None:
    head, key, (opening, closing) = LAYOUTS[version]

    def write_aside(aside: Path) -> None:
        with open(aside, "w", encoding="utf-8") as file:
            file.write(json.dumps(head | {"version": version})[:-1] + f', "{key}": {opening}')
            for number, line in enumerate(lines):
                file.write((",\n" if number else "\n") + line)
            file.write(f"\n{closing}}}\n")

    write_whole(path, write_aside)


def _read_lines(path: Path, version: Version) -> Iterator[str]:
    closing = LAYOUTS[version][2][1]
    try:
        with storage_errors(path), open(path, encoding="utf-8") as file:
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
