"""The source of truth of one quantized block: packed codes, scales and zero points of its linears.

`<linear>.codes` uint8 [O, ceil(I * bits / 8)] as `shardq.quant.packing` packs them, `<linear>.scale` float32 [O, G]
and, on an asymmetric grid, `<linear>.zero_point` int8 [O, G]; G groups of I / G input channels, 1 per channel. The
header's only metadata entry, `shardq`, is JSON with the grid and each linear's number of input channels, and with the
grids of the block's activations where there are any.
"""

import json
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from shardq.errors import CheckpointError
from shardq.formats.shards import read_header, read_metadata, read_tensor
from shardq.formats.tensor_file import write_filled, write_tensors
from shardq.quant import packing
from shardq.quant.activation import ActivationGrid
from shardq.quant.grid import Grid
from shardq.quant.integer_grid import IntegerGrid
from shardq.quant.quantized import QuantizedLinear

VERSION = 1


Shapes = dict[str, tuple[tuple[int, int], Grid]]
"""Shape [O, I] and grid of linears, by full name."""


def write_block(
    path: Path, linears: Mapping[str, QuantizedLinear], activations: dict[str, ActivationGrid] | None = None
) -> None:
    """Write one block's linears and grids of activations, by full name, to a file that appears whole."""
    tensors = {name: tensor for pair in linears.items() for name, tensor in _tensors_of(*pair).items()}
    shapes = {name: (_shape_of(linear), linear.grid) for name, linear in linears.items()}
    write_tensors(path, tensors, _metadata(shapes, activations))


def write_block_by_one(path: Path, shapes: Shapes, linears: Iterable[tuple[str, QuantizedLinear]]) -> None:
    """Write as `write_block`, to the byte, linears that need not be in memory together.

    Args:
        shapes: of all linears.
        linears: by full name, in any order.
    """
    like = {name: tensor for each in shapes for name, tensor in _tensors_of(each, _outline(*shapes[each])).items()}

    def fill(tensors: dict[str, Tensor]) -> Iterator[None]:
        for pair in linears:
            for name, tensor in _tensors_of(*pair).items():
                tensors[name].copy_(tensor)
            yield

    write_filled(path, like, fill, _metadata(shapes, None))


def _tensors_of(name: str, linear: QuantizedLinear) -> dict[str, Tensor]:
    """A linear's tensors in a block file."""
    tensors = {f"{name}.codes": packing.pack(linear.codes_OI, linear.grid), f"{name}.scale": linear.scale_OG.float()}
    if linear.grid.has_zero_point:
        tensors[f"{name}.zero_point"] = linear.zero_point_OG.char()
    return tensors


def _metadata(shapes: Shapes, activations: dict[str, ActivationGrid] | None) -> dict[str, str]:
    described = {name: {"in_features": shape[1], **grid.as_dict()} for name, (shape, grid) in shapes.items()}
    content = {"version": VERSION, "linears": described}
    if activations:
        # A list: their order is that of the block's code.
        content["activations"] = [{"name": name, **asdict(grid)} for name, grid in activations.items()]
    return {"shardq": json.dumps(content, sort_keys=True)}


def _shape_of(linear: QuantizedLinear) -> tuple[int, int]:
    num_outputs, num_inputs = linear.codes_OI.shape
    return num_outputs, num_inputs


def _outline(shape: tuple[int, int], grid: Grid) -> QuantizedLinear:
    """A quantized linear of a shape on the meta device."""
    codes_OI = torch.empty(shape, dtype=torch.int8, device="meta")
    scale_OG = torch.empty(shape[0], grid.num_groups(shape[1]), device="meta")
    return QuantizedLinear(codes_OI, scale_OG, scale_OG, grid)


class BlockFile(Mapping[str, QuantizedLinear]):
    """The linears of a block file, by full name; each is read when it is asked for.

    Args:
        names: their order (default: the file's).
        with_codes: whether codes are read; else they are on the meta device.

    Raises:
        CheckpointError: the file is missing or truncated, or not a block file of this version.
    """

    def __init__(self, path: Path, names: Iterable[str] | None = None, with_codes: bool = True):
        self._path, self._header, self._described = path, read_header(path), _described(path)
        self._names, self._with_codes = list(self._described if names is None else names), with_codes

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, name: str) -> QuantizedLinear:
        num_inputs, grid = self._described[name]
        kinds = ("codes", "scale", "zero_point") if self._with_codes else ("scale", "zero_point")
        parts = [f"{name}.{kind}" for kind in kinds]
        tensors = {part: read_tensor(self._header[part]) for part in parts if part in self._header}
        _check_shapes(self._path, name, tensors, num_inputs, grid, kinds)
        scale_OG = tensors[f"{name}.scale"]
        zero_point_OG = torch.zeros_like(scale_OG)
        if grid.has_zero_point:
            zero_point_OG = tensors[f"{name}.zero_point"].float()
        if not self._with_codes:
            return replace(self.outline(name), scale_OG=scale_OG, zero_point_OG=zero_point_OG)
        codes_OI = packing.unpack(tensors[f"{name}.codes"], num_inputs, grid)
        return QuantizedLinear(codes_OI, scale_OG, zero_point_OG, grid)

    def without_codes(self) -> "BlockFile":
        """The same with codes on the meta device, for those that need only the grids."""
        return BlockFile(self._path, self._names, with_codes=False)

    def outline(self, name: str) -> QuantizedLinear:
        """A linear on the meta device: its shapes, without reading it."""
        num_inputs, grid = self._described[name]
        return _outline((self._header[f"{name}.scale"].shape[0], num_inputs), grid)


def outline(linears: Mapping[str, QuantizedLinear], name: str) -> QuantizedLinear:
    """A linear of some on the meta device, which is not read for that."""
    if isinstance(linears, BlockFile):
        return linears.outline(name)
    return _outline(_shape_of(linears[name]), linears[name].grid)


def read_block(path: Path, some: Container[str] | None = None) -> dict[str, QuantizedLinear]:
    """Read what `write_block` wrote.

    Args:
        some: names of the linears to read (default: all).

    Raises:
        CheckpointError: as `BlockFile`.
    """
    linears = BlockFile(path)
    return {name: linears[name] for name in linears if some is None or name in some}


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


def _check_shapes(
    path: Path, name: str, tensors: dict[str, Tensor], num_inputs: int, grid: Grid, kinds: Container[str]
) -> None:
    """Raise CheckpointError where a linear's tensors are not all there or do not belong together."""
    num_outputs = len(tensors.get(f"{name}.scale", ()))
    scales = (num_outputs, grid.num_groups(num_inputs))
    expected = {"codes": (num_outputs, packing.packed_width(num_inputs, grid.bits)), "scale": scales}
    if grid.has_zero_point:
        expected["zero_point"] = scales
    for kind, shape in ((kind, shape) for kind, shape in expected.items() if kind in kinds):
        found = tensors.get(f"{name}.{kind}")
        if found is None or found.shape != shape:
            raise CheckpointError(
                f"{path}: {name}.{kind} {'is missing' if found is None else f'has shape {list(found.shape)}'}, "
                f"the grid asks for {list(shape)}; the file is damaged"
            )
    spare_bits = -num_inputs * grid.bits % 8
    if spare_bits and "codes" in kinds:
        if (tensors[f"{name}.codes"][:, -1] >> (8 - spare_bits)).any():
            raise CheckpointError(f"{path}: {name}.codes has bits set behind its last code; the file is damaged")
