"""The source of truth of one quantized block: packed codes, scales and zero points of its linears.

`<linear>.codes` uint8 [O, ceil(I * bits / 8)] as `shardq.quant.packing` packs them, `<linear>.scale` float32 [O, G]
and, on an asymmetric grid, `<linear>.zero_point` int8 [O, G]; G groups of I / G input channels, 1 per channel. The
header's only metadata entry, `shardq`, is JSON with the grid and each linear's number of input channels, and with the
grids of the block's activations where there are any.
"""

import json
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import chain
from math import prod
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from shardq.errors import CheckpointError
from shardq.formats.shards import read_header, read_metadata, read_tensor
from shardq.formats.tensor_file import LARGE_BYTES, write_one_by_one, write_tensors
from shardq.quant import packing
from shardq.quant.activation import ActivationGrid
from shardq.quant.grid import Grid
from shardq.quant.integer_grid import IntegerGrid
from shardq.quant.quantized import QuantizedLinear

VERSION = 1


Linears = Mapping[str, QuantizedLinear]
"""Quantized linears by name: a dict, or `LinearsInFiles`, which are written with one of them in memory at a time."""


@dataclass(frozen=True)
class LinearsInFiles(Linears):
    """Linears of which some are in memory and the others are read from block files whenever they are asked for.

    Attributes:
        held: those in memory, and for each other one its file, by the names in the files.
        names: names by which they are asked for, in order, and the names in the files.
    """

    held: dict[str, QuantizedLinear | Path]
    names: dict[str, str]

    def __getitem__(self, name: str) -> QuantizedLinear:
        inner = self.names[name]
        linear = self.held[inner]
        return read_block(linear, {inner})[inner] if isinstance(linear, Path) else linear

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def renamed(linears: Linears, names: dict[str, str]) -> Linears:
    """Linears under other names, in the names' order: from a new name to the present one."""
    if isinstance(linears, LinearsInFiles):
        return LinearsInFiles(linears.held, {name: linears.names[former] for name, former in names.items()})
    return {name: linears[former] for name, former in names.items()}


Shapes = dict[str, tuple[tuple[int, int], Grid]]
"""Shape [O, I] and grid of linears, by name."""


def write_block(path: Path, linears: Linears, activations: dict[str, ActivationGrid] | None = None) -> None:
    """Write one block's linears and grids of activations, by full name, to a file that appears whole."""
    shapes: Shapes = {}
    for name, linear in linears.items():
        num_outputs, num_inputs = linear.codes_OI.shape
        shapes[name] = (num_outputs, num_inputs), linear.grid
    if isinstance(linears, LinearsInFiles) or sum(prod(shape) for shape, _ in shapes.values()) > LARGE_BYTES:
        write_block_by_one(path, shapes, linears.items(), activations)
    else:
        tensors = chain.from_iterable(_tensors_of(*pair) for pair in linears.items())
        write_tensors(path, dict(tensors), _metadata(shapes, activations))


def write_block_by_one(
    path: Path,
    shapes: Shapes,
    linears: Iterable[tuple[str, QuantizedLinear]],
    activations: dict[str, ActivationGrid] | None = None,
) -> None:
    """Write as `write_block`, to the byte, linears of which each is made when the one before has been written.

    Args:
        shapes: of all of them.
        linears: by full name, in any order.
    """
    outlines = ((name, _outline(shape, grid)) for name, (shape, grid) in shapes.items())
    passes = iter((outlines, linears))
    write_one_by_one(path, lambda: chain.from_iterable(_tensors_of(*pair) for pair in next(passes)),
                     _metadata(shapes, activations))  # fmt: skip


def _tensors_of(name: str, linear: QuantizedLinear) -> Iterator[tuple[str, Tensor]]:
    """A linear's tensors in a block file."""
    yield f"{name}.codes", packing.pack(linear.codes_OI, linear.grid)
    yield f"{name}.scale", linear.scale_OG.float()
    if linear.grid.has_zero_point:
        yield f"{name}.zero_point", linear.zero_point_OG.char()


def _metadata(shapes: Shapes, activations: dict[str, ActivationGrid] | None) -> dict[str, str]:
    described = {name: {"in_features": shape[1], **grid.as_dict()} for name, (shape, grid) in shapes.items()}
    content = {"version": VERSION, "linears": described}
    if activations:
        # A list: their order is that of the block's code.
        content["activations"] = [{"name": name, **asdict(grid)} for name, grid in activations.items()]
    return {"shardq": json.dumps(content, sort_keys=True)}


def _outline(shape: tuple[int, int], grid: Grid) -> QuantizedLinear:
    """A quantized linear of a shape on the meta device."""
    codes_OI = torch.empty(shape, dtype=torch.int8, device="meta")
    scale_OG = torch.empty(shape[0], grid.num_groups(shape[1]), device="meta")
    return QuantizedLinear(codes_OI, scale_OG, scale_OG, grid)


def read_block(path: Path, some: Container[str] | None = None) -> dict[str, QuantizedLinear]:
    """Read what `write_block` wrote.

    Args:
        some: names of the linears to read (default: all).

    Raises:
        CheckpointError: the file is missing or truncated, or not a block file of this version.
    """
    header = read_header(path)
    wanted = {name: info for name, info in header.items() if some is None or name.rpartition(".")[0] in some}
    tensors = {name: read_tensor(info) for name, info in wanted.items()}
    linears = {}
    for name, (num_inputs, grid) in _described(path).items():
        if some is not None and name not in some:
            continue
        _check_shapes(path, name, tensors, num_inputs, grid)
        scale_OG = tensors[f"{name}.scale"]
        zero_point_OG = torch.zeros_like(scale_OG)
        if grid.has_zero_point:
            zero_point_OG = tensors[f"{name}.zero_point"].float()
        codes_OI = packing.unpack(tensors[f"{name}.codes"], num_inputs, grid)
        linears[name] = QuantizedLinear(codes_OI, scale_OG, zero_point_OG, grid)
    return linears


def read_grids(path: Path) -> dict[str, Grid]:
    """The grid of each linear in a block file; reads only the header.

    Raises:
        CheckpointError: as `read_block`.
    """
    read_header(path)  # for its errors
    return {name: grid for name, (_, grid) in _described(path).items()}


def read_scale_shapes(path: Path) -> dict[str, tuple[int, int]]:
    """Output channels and groups of each linear in a block file; reads only the header.

    Raises:
        CheckpointError: as `read_block`.
    """
    header = read_header(path)
    return {name: cast(tuple[int, int], header[f"{name}.scale"].shape) for name in _described(path)}


def read_activations(path: Path) -> dict[str, ActivationGrid]:
    """The grids of a block's activations, by full name; reads only the file's header.

    Raises:
        CheckpointError: as `read_block`.
    """
    read_header(path)  # for its errors
    grids = {}
    try:
        for facts in _content(path).get("activations", []):
            name, grid = facts.pop("name"), ActivationGrid(**facts)
            if not (4 <= grid.bits <= 16 and grid.is_valid):
                raise ValueError(f"{name}: {grid}")
            grids[name] = grid
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: the activations in its header are damaged ({error})") from error
    return grids


def _content(path: Path) -> dict:
    """The header's JSON.

    Raises:
        CheckpointError: it is none of this version's.
        ValueError, AttributeError, RecursionError: it is damaged.
    """
    content = json.loads(read_metadata(path).get("shardq", "{}"))
    if content.get("version") != VERSION:
        raise CheckpointError(f"{path}: not a block file of version {VERSION}; another program wrote it")
    return content


def _described(path: Path) -> dict[str, tuple[int, Grid]]:
    """Number of input channels and grid of each linear."""
    try:
        described = _content(path)["linears"]
        linears: dict[str, tuple[int, Grid]] = {
            name: (facts.pop("in_features"), IntegerGrid(**facts)) for name, facts in described.items()
        }
        for num_inputs, grid in linears.values():
            if not grid.divides(num_inputs):
                raise ValueError(f"{num_inputs} input channels, {grid}")
    except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError, RecursionError) as error:
        raise CheckpointError(f"{path}: the grids in its header are damaged ({error})") from error
    return linears


def _check_shapes(path: Path, name: str, tensors: dict[str, Tensor], num_inputs: int, grid: Grid) -> None:
    """Raise CheckpointError where a linear's tensors are not all there or do not belong together."""
    num_outputs = len(tensors.get(f"{name}.scale", ()))
    scales = (num_outputs, grid.num_groups(num_inputs))
    expected = {"codes": (num_outputs, packing.packed_width(num_inputs, grid.bits)), "scale": scales}
    if grid.has_zero_point:
        expected["zero_point"] = scales
    for kind, shape in expected.items():
        found = tensors.get(f"{name}.{kind}")
        if found is None or found.shape != shape:
            raise CheckpointError(
                f"{path}: {name}.{kind} {'is missing' if found is None else f'has shape {list(found.shape)}'}, "
                f"the grid asks for {list(shape)}; the file is damaged"
            )
    if spare_bits := -num_inputs * grid.bits % 8:
        if (tensors[f"{name}.codes"][:, -1] >> (8 - spare_bits)).any():
            raise CheckpointError(f"{path}: {name}.codes has bits set behind its last code; the file is damaged")
