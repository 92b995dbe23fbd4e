"""The source of truth of one quantized block: packed codes, scales and zero points of its linears.

`<linear>.codes` uint8 [O, ceil(I * bits / 8)] as `shardq.quant.packing` packs them, `<linear>.scale` float32 [O, G]
and, on an asymmetric grid, `<linear>.zero_point` int8 [O, G]; G groups of I / G input channels, 1 per channel. The
header's only metadata entry, `shardq`, is JSON with the grid and each linear's number of input channels, and with the
grids of the block's activations where there are any.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import cast

from torch import Tensor

from shardq.errors import CheckpointError
from shardq.formats.shards import read_header, read_metadata
from shardq.formats.tensor_file import read_tensors, write_tensors
from shardq.quant import packing
from shardq.quant.activation import ActivationGrid
from shardq.quant.quantized import QuantizedLinear
from shardq.quant.spec import MAX_DECOMPRESSED_BITS, QuantSpec

VERSION = 1


def write_block(
    path: Path, linears: dict[str, QuantizedLinear], activations: dict[str, ActivationGrid] | None = None
) -> None:
    """Write one block's linears and grids of activations, by full name, to a file that appears whole."""
    tensors: dict[str, Tensor] = {}
    for name, linear in linears.items():
        tensors[f"{name}.codes"] = packing.pack(linear.codes_OI, linear.spec)
        tensors[f"{name}.scale"] = linear.scale_OG.float()
        if not linear.spec.symmetric:
            tensors[f"{name}.zero_point"] = linear.zero_point_OG.char()
    described = {
        name: {"in_features": linear.codes_OI.shape[1], **asdict(linear.spec)} for name, linear in linears.items()
    }
    content = {"version": VERSION, "linears": described}
    if activations:
        # A list: their order is that of the block's code.
        content["activations"] = [{"name": name, **asdict(grid)} for name, grid in activations.items()]
    write_tensors(path, tensors, {"shardq": json.dumps(content, sort_keys=True)})


def read_block(path: Path) -> dict[str, QuantizedLinear]:
    """Read what `write_block` wrote.

    Raises:
        CheckpointError: the file is missing or truncated, or not a block file of this version.
    """
    tensors = read_tensors(path)
    linears = {}
    for name, (num_inputs, spec) in _described(path).items():
        _check_shapes(path, name, tensors, num_inputs, spec)
        scale_OG = tensors[f"{name}.scale"]
        zero_point_OG = scale_OG.new_zeros(scale_OG.shape) if spec.symmetric else tensors[f"{name}.zero_point"].float()
        codes_OI = packing.unpack(tensors[f"{name}.codes"], num_inputs, spec)
        linears[name] = QuantizedLinear(codes_OI, scale_OG, zero_point_OG, spec)
    return linears


def read_grids(path: Path) -> dict[str, QuantSpec]:
    """The grid of each linear in a block file, from its header alone.

    Raises:
        CheckpointError: as `read_block`.
    """
    read_header(path)  # for its errors
    return {name: spec for name, (_, spec) in _described(path).items()}


def read_scale_shapes(path: Path) -> dict[str, tuple[int, int]]:
    """Output channels and groups of each linear in a block file, from its header alone.

    Raises:
        CheckpointError: as `read_block`.
    """
    header = read_header(path)
    return {name: cast(tuple[int, int], header[f"{name}.scale"].shape) for name in _described(path)}


def read_activations(path: Path) -> dict[str, ActivationGrid]:
    """The grids of a block's activations, by full name, from its file's header alone.

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


def _described(path: Path) -> dict[str, tuple[int, QuantSpec]]:
    """Number of input channels and grid of each linear."""
    try:
        described = _content(path)["linears"]
        linears = {name: (facts.pop("in_features"), QuantSpec(**facts)) for name, facts in described.items()}
        for num_inputs, spec in linears.values():
            if not (2 <= spec.bits <= 8 and num_inputs % (spec.group_size or num_inputs) == 0):
                raise ValueError(f"{num_inputs} input channels, {spec}")
            if not (spec.decompressed_bits is None or spec.bits < spec.decompressed_bits <= MAX_DECOMPRESSED_BITS):
                raise ValueError(f"{spec.decompressed_bits} decompressed bits, {spec}")
    except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError, RecursionError) as error:
        raise CheckpointError(f"{path}: the grids in its header are damaged ({error})") from error
    return linears


def _check_shapes(path: Path, name: str, tensors: dict[str, Tensor], num_inputs: int, spec: QuantSpec) -> None:
    """Raise CheckpointError where a linear's tensors are not all there or do not belong together."""
    num_outputs = len(tensors.get(f"{name}.scale", ()))
    grid = (num_outputs, num_inputs // (spec.group_size or num_inputs))
    expected = {"codes": (num_outputs, packing.packed_width(num_inputs, spec.bits)), "scale": grid}
    if not spec.symmetric:
        expected["zero_point"] = grid
    for kind, shape in expected.items():
        found = tensors.get(f"{name}.{kind}")
        if found is None or found.shape != shape:
            raise CheckpointError(
                f"{path}: {name}.{kind} {'is missing' if found is None else f'has shape {list(found.shape)}'}, "
                f"the grid asks for {list(shape)}; the file is damaged"
            )
    if spare_bits := -num_inputs * spec.bits % 8:
        if (tensors[f"{name}.codes"][:, -1] >> (8 - spare_bits)).any():
            raise CheckpointError(f"{path}: {name}.codes has bits set behind its last code; the file is damaged")
