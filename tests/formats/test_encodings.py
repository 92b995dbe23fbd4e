"""AIMET encodings: AIMET's own dictionaries for its own grids, and files that are plain JSON."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from shardq import __version__
from shardq.errors import CheckpointError, ConfigError
from shardq.formats import encodings
from shardq.quant.activation import ActivationGrid, ActivationLevels, grid_between
from shardq.quant.integer_grid import IntegerGrid
from shardq.quant.quantized import QuantizedLinear

GOLDEN = Path(__file__).parents[1] / "golden"
RECORDED = json.loads((GOLDEN / "golden.json").read_text())
SMALL = json.loads((GOLDEN / "encodings.json").read_text())
RECORDED_LPBQ = json.loads((GOLDEN / "lpbq.json").read_text())
PER_CHANNEL = [name for name, case in RECORDED.items() if case["group"] is None]


def golden_linear(name: str) -> QuantizedLinear:
    """A linear on the grid that AIMET folded; encodings do not depend on the codes."""
    case = RECORDED[name]
    scale = load_file(GOLDEN / f"{name}.safetensors")["folded_scale"].reshape(case["shape"][0], -1)
    grid = IntegerGrid(bits=case["bits"], group_size=case["group"])
    return QuantizedLinear(torch.zeros(case["shape"], dtype=torch.int8), scale, torch.zeros_like(scale), grid)


def asymmetric_linear(group_size: int | None = None, bits: int = 4) -> tuple[QuantizedLinear, torch.Tensor]:
    """A linear rounded to the nearest, and the lower ends of its rows."""
    grid = IntegerGrid(bits=bits, symmetric=False, group_size=group_size)
    weight = torch.randn(6, 32) + torch.linspace(-3, 3, 6)[:, None]
    rows = grid.rows(weight)
    low, high = grid.start_range(rows)
    scale = grid.scale_of(low, high)
    zero_point = grid.zero_point_of(low, scale)
    codes = grid.encode(rows, scale, zero_point).reshape(6, 32)
    return QuantizedLinear(codes, scale.reshape(6, -1), zero_point.reshape(6, -1), grid), low.flatten()


def entries(version: encodings.Version, linear: QuantizedLinear) -> object:
    """One weight's item, called `l.weight`; of 0.6.1 what stands under the name."""
    item = encodings.item_of(version, "l.weight", linear)
    return item["l.weight"] if version == "0.6.1" else item


def same_json(found: object, expected: object) -> bool:
    """Equal with equal types: True is not 1, and 8 is not 8.0."""
    return json.dumps(found, sort_keys=True) == json.dumps(expected, sort_keys=True)


@pytest.mark.parametrize("name", RECORDED)
def test_version_0_entries_are_aimets(name: str):
    assert same_json(entries("0.6.1", golden_linear(name)), RECORDED[name]["encodings"]["0.6.1"])


@pytest.mark.parametrize("name", PER_CHANNEL)
def test_version_1_entry_is_aimets(name: str):
    found = entries("1.0.0", golden_linear(name))
    assert same_json(found, RECORDED[name]["encodings"]["1.0.0"] | {"name": "l.weight"})


def test_grouped_version_1_entry_is_aimets_per_block_layout():
    """The golden case was recorded row by row; AIMET writes a grouped weight as PER_BLOCK, its rows in that order."""
    found = entries("1.0.0", golden_linear("w4_group16"))
    per_block = {"name": "l.weight", "enc_type": "PER_BLOCK", "block_size": 16}
    assert same_json(found, RECORDED["w4_group16"]["encodings"]["1.0.0"] | per_block)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("version", ["0.6.1", "1.0.0", "2.0.0", "2.1.0"])
def test_every_version_is_aimets_to_the_json_type(name: str, version: str):
    case = SMALL[name]
    grid = IntegerGrid(bits=case["bits"], symmetric=case["symmetric"], group_size=case["group_size"])
    codes, zero_point = torch.zeros(3, 8, dtype=torch.int8), torch.tensor(case["zero_point"]).float()
    found = entries(version, QuantizedLinear(codes, torch.tensor(case["scale"]), zero_point, grid))
    expected = case["encodings"][version]
    assert same_json(found, expected if version == "0.6.1" else expected | {"name": "l.weight"})


@pytest.mark.parametrize("name", RECORDED_LPBQ)
def test_two_level_entries_are_aimets_lpbq_and_its_plain_groups(name: str):
    """AIMET's own scales: multipliers and channels' scales are found in them to the bit."""
    case, scale = RECORDED_LPBQ[name], load_file(GOLDEN / f"{name}.safetensors")["scale"]
    grid = IntegerGrid(bits=case["bits"], group_size=case["group"], decompressed_bits=case["decompressed"])
    codes = torch.zeros(len(scale), scale.shape[1] * case["group"], dtype=torch.int8)
    linear = QuantizedLinear(codes, scale, torch.zeros_like(scale), grid)
    assert same_json(entries("1.0.0", linear), case["encodings"]["1.0.0"] | {"name": "l.weight"})
    for version in ("2.0.0", "2.1.0"):  # recorded as AIMET's encoding objects count axes, from the last
        expected = case["encodings"][version] | {"name": "l.weight", "axis": 1}
        if version == "2.1.0":
            expected["y_scale"] |= {"axis": 0}
        assert same_json(entries(version, linear), expected)
    assert same_json(entries("0.6.1", linear), case["encodings"]["0.6.1"])


def test_groups_run_along_the_inputs_of_one_output_first():
    scale = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    grid = IntegerGrid(bits=4, group_size=4)
    linear = QuantizedLinear(torch.zeros(3, 8, dtype=torch.int8), scale, torch.zeros(3, 2), grid)
    assert entries("1.0.0", linear)["scale"] == [1, 2, 3, 4, 5, 6]
    assert [row["scale"] for row in entries("0.6.1", linear)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("group_size", [None, 8])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_asymmetric_offset_is_the_lower_end_in_steps(bits: int, group_size: int | None):
    linear, low = asymmetric_linear(group_size, bits)
    steps = low.double() / linear.scale_OG.flatten().double()
    v1 = entries("1.0.0", linear)
    rows = entries("0.6.1", linear)
    assert v1["offset"] == [row["offset"] for row in rows]
    assert all(type(offset) is int and offset <= 0 for offset in v1["offset"])
    assert (torch.tensor(v1["offset"]) - steps).abs().max() <= 0.5 + 1e-4  # the nearest; half a step may go either way


@pytest.mark.parametrize("group_size", [None, 8])
def test_asymmetric_entries_say_so_in_each_versions_own_type(group_size: int | None):
    linear, _ = asymmetric_linear(group_size)
    assert entries("1.0.0", linear)["is_sym"] is False
    assert {row["is_symmetric"] for row in entries("0.6.1", linear)} == {"False"}


@pytest.mark.parametrize("group_size", [None, 8])
def test_ends_of_an_asymmetric_grid_hold_every_quantized_weight(group_size: int | None):
    """AIMET rebuilds scale and offset from `min` and `max`: quantizing with those must change nothing."""
    linear, _ = asymmetric_linear(group_size)
    weights = linear.dequantized().reshape(-1, group_size or 32).tolist()
    for row, entry in zip(weights, entries("0.6.1", linear), strict=True):
        step = (entry["max"] - entry["min"]) / 15
        offset = round(entry["min"] / step)
        assert offset == entry["offset"]
        codes = [value / step - offset for value in row]
        assert all(abs(code - round(code)) < 1e-4 and 0 <= round(code) <= 15 for code in codes)


@pytest.fixture(name="linears")
def _linears() -> dict[str, QuantizedLinear]:
    return {"a": golden_linear("w4_channel"), 'odd "name"': asymmetric_linear(8)[0]}


HEADERS = {
    "0.6.1": {"activation_encodings": {}, "excluded_layers": []},
    "1.0.0": {"activation_encodings": [], "excluded_layers": []},
    "2.0.0": {},
    "2.1.0": {},
}


@pytest.mark.parametrize("version", HEADERS)
def test_a_file_is_json_with_aimets_header(tmp_path: Path, linears: dict, version: str):
    encodings.write(tmp_path / "a", version, linears)
    items = [encodings.item_of(version, f"{name}.weight", linear) for name, linear in linears.items()]
    header = HEADERS[version] | {"version": version, "producer": {"package": "shardq", "version": __version__}}
    if version == "0.6.1":
        body = {"param_encodings": items[0] | items[1]}
    else:
        body = {"encodings" if version > "2" else "param_encodings": items}
    assert same_json(json.loads((tmp_path / "a").read_text()), header | body)
    assert list(encodings.read(tmp_path / "a", version)) == items


@pytest.mark.parametrize("version", HEADERS)
def test_files_without_weights_are_json_too(tmp_path: Path, version: str):
    encodings.write(tmp_path / "a", version, {})
    assert not json.loads((tmp_path / "a").read_text())["encodings" if version > "2" else "param_encodings"]
    assert list(encodings.read(tmp_path / "a", version)) == []


@pytest.mark.parametrize("version", HEADERS)
def test_merged_files_are_those_of_all_weights_at_once(tmp_path: Path, version: str):
    blocks = [{f"layers.{block}.{name}": asymmetric_linear()[0] for name in "qk"} for block in range(3)]
    for number, linears in enumerate(blocks):
        encodings.write(tmp_path / f"{number}", version, linears)
    encodings.merge(tmp_path / "merged", version, [tmp_path / f"{number}" for number in range(3)])
    encodings.write(tmp_path / "whole", version, blocks[0] | blocks[1] | blocks[2])
    assert (tmp_path / "merged").read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_file_of_another_version_is_not_taken(tmp_path: Path, linears: dict):
    encodings.write(tmp_path / "a", "2.0.0", linears)
    with pytest.raises(CheckpointError, match="not version 2.1.0"):
        encodings.merge(tmp_path / "b", "2.1.0", [tmp_path / "a"])


def test_a_part_that_is_cut_off_leaves_the_old_file(tmp_path: Path, linears: dict):
    for name in ("a", "b", "merged"):
        encodings.write(tmp_path / name, "1.0.0", linears)
    before = (tmp_path / "merged").read_bytes()
    (tmp_path / "b").write_text((tmp_path / "b").read_text()[:-3])
    with pytest.raises(CheckpointError, match="b: cut off"):
        encodings.merge(tmp_path / "merged", "1.0.0", [tmp_path / "a", tmp_path / "b"])
    assert (tmp_path / "merged").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "merged"]


def test_parts_are_merged_one_item_at_a_time(tmp_path: Path, linears: dict):
    """A model of any depth must fit: each block's items are on their way to the file before the next are read."""
    encodings.write(tmp_path / "part", "1.0.0", {"a": linears["a"]})
    written = []

    def parts():
        for _ in range(200):
            aside = list(tmp_path.glob("merged*"))
            written.append(aside[0].stat().st_size if aside else 0)
            yield tmp_path / "part"

    encodings.merge(tmp_path / "merged", "1.0.0", parts())
    assert written[0] == 0 and written[-1] > (tmp_path / "merged").stat().st_size / 2


@pytest.mark.parametrize("kind", ["symmetric", "asymmetric", "full_range"])
@pytest.mark.parametrize("group_size", [None, 8])
def test_version_2_describes_the_grid_points(group_size: int | None, kind: str):
    """Codes that are rebuilt as the version says: `(code - y_zero_point) * y_scale` along `axis`."""
    linear = asymmetric_linear(group_size)[0]
    if kind != "asymmetric":
        scale = linear.scale_OG * (1 if kind == "symmetric" else torch.randn_like(linear.scale_OG).sign())
        grid = IntegerGrid(bits=4, group_size=group_size, full_range=kind == "full_range")
        linear = QuantizedLinear(linear.codes_OI, scale, torch.zeros_like(scale), grid)
    item = entries("2.0.0", linear)
    assert same_json(item, entries("2.1.0", linear))
    assert item["output_dtype"] == ("int4" if kind == "symmetric" else "uint4")
    assert (item["axis"], item.get("block_size")) == ((1, 8) if group_size else (0, None))
    scale = torch.tensor(item["y_scale"]).reshape(6, -1).repeat_interleave(group_size or 32, 1)
    zero_point = torch.tensor(item.get("y_zero_point", 0)).expand(scale.shape) if kind == "symmetric" else (
        torch.tensor(item["y_zero_point"]).reshape(6, -1).repeat_interleave(group_size or 32, 1)
    )  # fmt: skip
    low, high = (-8, 7) if kind == "symmetric" else (0, 15)
    weight = linear.dequantized()
    codes = (weight / scale).round() + zero_point
    assert codes.min() >= low and codes.max() <= high
    assert torch.equal((codes - zero_point) * scale, weight)


def test_sizes_are_about_what_is_written(tmp_path: Path):
    grid = IntegerGrid(bits=4, group_size=32)
    linear = QuantizedLinear(
        torch.zeros(64, 1024, dtype=torch.int8), torch.rand(64, 32) / 50, torch.zeros(64, 32), grid
    )
    for version in HEADERS:
        encodings.write(tmp_path / version, version, {"l": linear})
        assert (tmp_path / version).stat().st_size / 2048 == pytest.approx(encodings.BYTES_A_SCALE[version], rel=0.05)


@pytest.mark.parametrize(
    "version, model, advice",
    [
        ("0.6.1", "70B in groups of 64", "about 171.. GB.*larger groups"),
        ("0.6.1", "8B in groups of 64", r"109051904 scales would make about 17.. GB.*choose --aimet.version 1.0.0 or"),
        ("1.0.0", "70B in groups of 64", "about 27.. GB.*per-channel"),
    ],
)
def test_files_that_no_program_could_load_are_refused(version: str, model: str, advice: str):
    num_scales = {"70B in groups of 64": 80 * 855_638_016 // 64, "8B in groups of 64": 32 * 218_103_808 // 64}[model]
    with pytest.raises(ConfigError, match=advice):
        encodings.check_size(version, num_scales)
    encodings.check_size(version, 80 * 83_968)  # 70B per-channel


@pytest.mark.parametrize("group_size", [None, 8])
@pytest.mark.parametrize("bits", [2, 4])
def test_full_range_grid_is_the_asymmetric_one_of_the_same_points(bits: int, group_size: int | None):
    grid = IntegerGrid(bits=bits, group_size=group_size, full_range=True)
    rows = grid.rows(torch.randn(6, 32))
    scale = grid.scale_of(*grid.start_range(rows))
    codes = grid.encode(rows, scale, torch.zeros_like(scale)).reshape(6, 32)
    linear = QuantizedLinear(codes, scale.reshape(6, -1), torch.zeros_like(scale).reshape(6, -1), grid)
    v1 = entries("1.0.0", linear)
    found = entries("0.6.1", linear)
    assert (scale < 0).any() and min(v1["scale"]) > 0 and v1["is_sym"] is False and found[0]["is_symmetric"] == "False"
    for row, row_scale, positive, offset in zip(
        found, scale.flatten().tolist(), v1["scale"], v1["offset"], strict=True
    ):
        points = torch.arange(grid.qmin, grid.qmax + 1) * row_scale
        described = (torch.arange(2**bits) + offset) * positive
        assert torch.equal(described, points.sort().values)
        assert (row["min"], row["max"]) == (points.min().item(), points.max().item())


ACTIVATIONS = json.loads((GOLDEN / "activations.json").read_text())["encodings"]


def activation_grid(case: str) -> ActivationGrid:
    values, (bits, kind) = load_file(GOLDEN / "activations.safetensors")["outlier"], case.split()
    return grid_between(values.min(), values.max(), ActivationLevels(bits=int(bits), symmetric=kind == "symmetric"))


@pytest.mark.parametrize("case", ACTIVATIONS)
def test_entries_of_activations_are_aimets(case: str):
    grids = {"block.fc.input": activation_grid(case)}
    (v1,), recorded = encodings.activations_of("1.0.0", grids), ACTIVATIONS[case]
    assert same_json(v1, recorded["1.0.0"] | {"name": "block.fc.input"})
    assert list(v1)[1:] == list(recorded["1.0.0"])
    row = encodings.activations_of("0.6.1", grids)["block.fc"]["input"]["0"]
    assert same_json(row, recorded["0.6.1"][0]) and list(row) == list(recorded["0.6.1"][0])


def test_activations_lie_under_their_modules_and_only_static_ones_are_listed():
    static, by_token = ActivationGrid(8, True, 0.5, 0), ActivationGrid(8, True)
    names = ["b.input", "b.fc.input", "b.fc.output", "b.attn.query", "b.attn.context"]
    grids = dict.fromkeys(names, static) | {"b.norm.output": by_token}
    assert [entry["name"] for entry in encodings.activations_of("1.0.0", grids)] == names
    by_module = encodings.activations_of("0.6.1", grids)
    assert {module: list(sides) for module, sides in by_module.items()} == {"b": ["input"], "b.fc": ["input", "output"]}


def test_files_give_activations_back_beside_the_weights(tmp_path: Path):
    grids = {"b.fc.input": ActivationGrid(8, False, 0.25, 3), "b.fc.output": ActivationGrid(16, True, 1e-3, 0)}
    linear, _ = asymmetric_linear()
    for version in HEADERS:
        path, made = tmp_path / version, encodings.activations_of(version, grids)
        encodings.write(path, version, {"b.fc": linear}, grids)
        content = json.loads(path.read_text())
        weight = encodings.item_of(version, "b.fc.weight", linear)
        if version > "2":
            assert content["encodings"] == [*made, weight] and len(made) == 2
        else:
            assert encodings.read_activations(path, version) == made == content["activation_encodings"]
            assert list(encodings.read(path, version)) == [weight]


def test_activations_of_version_2_are_one_scale_and_zero_point():
    grids = {"b.input": ActivationGrid(8, False, 0.25, 3), "b.output": ActivationGrid(16, True, 0.5, 0)}
    assert encodings.activations_of("2.0.0", grids) == [
        {"name": "b.input", "output_dtype": "uint8", "y_scale": 0.25, "y_zero_point": 131},
        {"name": "b.output", "output_dtype": "int16", "y_scale": 0.5},
    ]
