"""The file of one quantized block: readable with the safetensors library alone, and read back exactly."""

import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from shardq.errors import CheckpointError
from shardq.formats.block_file import read_activations, read_block, read_scale_shapes, write_block, write_block_by_one
from shardq.quant.activation import ActivationGrid
from shardq.quant.integer_grid import IntegerGrid
from shardq.quant.quantized import QuantizedLinear

NAME = "model.layers.0.self_attn.q_proj"


def random_linear(
    bits: int, symmetric: bool = True, group_size: int | None = None, shape: tuple[int, int] = (6, 24)
) -> QuantizedLinear:
    qmin, qmax = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    grid_shape = shape[0], shape[1] // (group_size or shape[1])
    zero_point = torch.zeros(grid_shape) if symmetric else torch.randint(qmin, qmax + 1, grid_shape).float()
    if not symmetric:
        zero_point[0, 0], zero_point[-1, -1] = qmin, qmax
    codes = torch.randint(qmin, qmax + 1, shape, dtype=torch.int8)
    grid = IntegerGrid(bits=bits, symmetric=symmetric, group_size=group_size)
    return QuantizedLinear(codes, torch.rand(grid_shape), zero_point, grid)


def assert_same_linear(found: QuantizedLinear, expected: QuantizedLinear) -> None:
    assert found.grid == expected.grid
    for name in ("codes_OI", "scale_OG", "zero_point_OG"):
        assert getattr(found, name).dtype == getattr(expected, name).dtype
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


def unpacked_by_hand(packed: list[int], num_codes: int, bits: int) -> list[int]:
    number = int.from_bytes(bytes(packed), "little")
    return [(number >> (position * bits)) % 2**bits - 2 ** (bits - 1) for position in range(num_codes)]


@pytest.mark.parametrize("group_size", [None, 8])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_block_is_read_back_exactly(tmp_path, bits: int, symmetric: bool, group_size: int | None):
    linears = {NAME: random_linear(bits, symmetric, group_size), "other": random_linear(bits, symmetric, shape=(3, 7))}
    write_block(tmp_path / "block.safetensors", linears)
    found = read_block(tmp_path / "block.safetensors")
    assert set(found) == set(linears)
    assert read_scale_shapes(tmp_path / "block.safetensors") == {
        name: tuple(linear.scale_OG.shape) for name, linear in linears.items()
    }
    for name, linear in linears.items():
        assert_same_linear(found[name], linear)


@pytest.mark.parametrize("bits", [3, 4])
def test_codes_scales_and_zero_points_are_readable_without_shardq(tmp_path, bits: int):
    linear = random_linear(bits, symmetric=False, group_size=8)
    write_block(tmp_path / "block.safetensors", {NAME: linear})
    tensors = load_file(tmp_path / "block.safetensors")
    codes = [unpacked_by_hand(row, 24, bits) for row in tensors[f"{NAME}.codes"].tolist()]
    assert codes == linear.codes_OI.tolist()
    assert torch.equal(tensors[f"{NAME}.scale"], linear.scale_OG)
    assert tensors[f"{NAME}.zero_point"].dtype == torch.int8
    assert tensors[f"{NAME}.zero_point"].tolist() == linear.zero_point_OG.tolist()


def test_symmetric_linear_stores_no_zero_point(tmp_path):
    write_block(tmp_path / "block.safetensors", {NAME: random_linear(4)})
    assert set(load_file(tmp_path / "block.safetensors")) == {f"{NAME}.codes", f"{NAME}.scale"}


def test_header_describes_every_linear(tmp_path):
    write_block(tmp_path / "block.safetensors", {NAME: random_linear(3, False, 8), "other": random_linear(4)})
    with safe_open(tmp_path / "block.safetensors", "pt") as file:
        metadata = file.metadata()
    assert list(metadata) == ["shardq"]
    common = {"decompressed_bits": None, "full_range": False, "in_features": 24, "scale_dtype": None}
    assert json.loads(metadata["shardq"]) == {
        "version": 1,
        "linears": {
            NAME: common | {"bits": 3, "symmetric": False, "group_size": 8},
            "other": common | {"bits": 4, "symmetric": True, "group_size": None},
        },
    }


def test_equal_blocks_give_equal_bytes(tmp_path):
    linears = {NAME: random_linear(4, False), "other": random_linear(3)}
    write_block(tmp_path / "a.safetensors", linears)
    write_block(tmp_path / "b.safetensors", dict(reversed(linears.items())))
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_four_bit_codes_take_half_a_byte_each(tmp_path):
    write_block(tmp_path / "block.safetensors", {NAME: random_linear(4, shape=(64, 1024))})
    scales_and_header = 64 * 4 + 1024
    assert (tmp_path / "block.safetensors").stat().st_size < 64 * 1024 // 2 + scales_and_header


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_block_that_cannot_be_read_is_named(tmp_path, damage: str):
    path = tmp_path / "block.safetensors"
    if damage == "truncated":
        write_block(path, {NAME: random_linear(4)})
        os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(CheckpointError) as caught:
        read_block(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


DAMAGED_GRIDS = [
    {"bits": 1},
    {"bits": 9},
    {"bits": "4"},
    {"group_size": 0},
    {"group_size": 5},
    {"full_range": True, "symmetric": False},
    {"decompressed_bits": 4, "group_size": 8},
    {"decompressed_bits": 10**12, "group_size": 8},
    {"decompressed_bits": 8},
    {"scale_dtype": "int3"},
    {"in_features": 0},
]


@pytest.mark.parametrize("damage", DAMAGED_GRIDS, ids=str)
def test_grids_that_there_are_not_are_refused(tmp_path, damage: dict):
    path = tmp_path / "block.safetensors"
    write_block(path, {NAME: random_linear(4)})
    with safe_open(path, "pt") as file:
        content = json.loads(file.metadata()["shardq"])
    content["linears"][NAME] |= damage
    save_file(load_file(path), path, {"shardq": json.dumps(content)})
    with pytest.raises(CheckpointError, match="the grids in its header are damaged"):
        read_block(path)


@pytest.mark.parametrize("metadata", [None, {"shardq": '{"version": 2, "linears": {}}'}], ids=["none", "newer"])
def test_file_of_another_program_or_version_is_refused(tmp_path, metadata):
    save_file({"a": torch.zeros(2)}, tmp_path / "block.safetensors", metadata)
    with pytest.raises(CheckpointError, match=r"block\.safetensors: not a block file of version 1"):
        read_block(tmp_path / "block.safetensors")


GRIDS = {
    "b.fc.input": ActivationGrid(8, False, 0.1, -3),
    "b.attn.key": ActivationGrid(4, True),
    "b.a": ActivationGrid(16, True, 2.0, 0),
}


def test_grids_of_activations_are_kept_in_their_order(tmp_path):
    path, linears = tmp_path / "block.safetensors", {NAME: random_linear(4)}
    write_block(path, linears)
    assert read_activations(path) == {}
    write_block(path, linears, GRIDS)
    assert list(read_activations(path).items()) == list(GRIDS.items())
    assert torch.equal(read_block(path)[NAME].codes_OI, linears[NAME].codes_OI)


@pytest.mark.parametrize(
    "grid",
    [
        ActivationGrid(8, True, -1.0, 0),
        ActivationGrid(8, True, 1.0, 3),
        ActivationGrid(17, True),
        ActivationGrid(8, True, "a", 0),
    ],
)
def test_damaged_grids_of_activations_are_named(tmp_path, grid):
    write_block(tmp_path / "block.safetensors", {NAME: random_linear(4)}, {"b.fc.input": grid})
    with pytest.raises(CheckpointError, match="the activations in its header are damaged"):
        read_activations(tmp_path / "block.safetensors")


@pytest.mark.parametrize("grid", [(4,), (3, False, 8)])
def test_linears_one_by_one_make_the_same_file(tmp_path, grid):
    linears = {f"b.{number}": random_linear(*grid) for number in range(11)}
    write_block(tmp_path / "at-once", linears)
    shapes = {name: ((6, 24), linear.grid) for name, linear in linears.items()}
    write_block_by_one(tmp_path / "by-one", shapes, reversed(linears.items()))
    assert (tmp_path / "by-one").read_bytes() == (tmp_path / "at-once").read_bytes()
