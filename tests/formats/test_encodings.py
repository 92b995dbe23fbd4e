"""AIMET encodings: AIMET's own dictionaries for its own grids, and files that are plain JSON."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from shardq import __version__
from shardq.formats import encodings
from shardq.quant import affine
from shardq.quant.activation import ActivationGrid, grid_between
from shardq.quant.quantized import QuantizedLinear
from shardq.quant.spec import QuantSpec

GOLDEN = Path(__file__).parents[1] / "golden"
RECORDED = json.loads((GOLDEN / "golden.json").read_text())
RECORDED_LPBQ = json.loads((GOLDEN / "lpbq.json").read_text())
PER_CHANNEL = [name for name, case in RECORDED.items() if case["group"] is None]


def golden_linear(name: str) -> QuantizedLinear:
    """A linear on the grid that AIMET folded; encodings do not depend on the codes."""
    case = RECORDED[name]
    scale = load_file(GOLDEN / f"{name}.safetensors")["folded_scale"].reshape(case["shape"][0], -1)
    spec = QuantSpec(bits=case["bits"], group_size=case["group"])
    return QuantizedLinear(torch.zeros(case["shape"], dtype=torch.int8), scale, torch.zeros_like(scale), spec)


def asymmetric_linear(group_size: int | None = None, bits: int = 4) -> tuple[QuantizedLinear, torch.Tensor]:
    """A linear rounded to the nearest, and the lower ends of its rows."""
    spec = QuantSpec(bits=bits, symmetric=False, group_size=group_size)
    weight = torch.randn(6, 32) + torch.linspace(-3, 3, 6)[:, None]
    rows = affine.to_rows(weight, spec)
    low, high = affine.start_range(rows, spec)
    scale = affine.scale_of(low, high, spec)
    zero_point = affine.zero_point_of(low, scale, spec)
    codes = affine.quantize(rows, scale, zero_point, spec).reshape(6, 32)
    return QuantizedLinear(codes, scale.reshape(6, -1), zero_point.reshape(6, -1), spec), low.flatten()


def through_json(value: object) -> object:
    return json.loads(json.dumps(value))


def same_json(found: object, expected: object) -> bool:
    """Equal with equal types: True is not 1, and 8 is not 8.0."""
    return json.dumps(found, sort_keys=True) == json.dumps(expected, sort_keys=True)


@pytest.mark.parametrize("name", RECORDED)
def test_torch_entries_are_aimets(name: str):
    assert same_json(encodings.encoding_torch(golden_linear(name)), RECORDED[name]["encodings"]["0.6.1"])


@pytest.mark.parametrize("name", PER_CHANNEL)
def test_version_1_entry_is_aimets(name: str):
    found = encodings.encoding_v1("l.weight", golden_linear(name))
    assert same_json(found, RECORDED[name]["encodings"]["1.0.0"] | {"name": "l.weight"})


def test_grouped_version_1_entry_is_aimets_per_block_layout():
    """The golden case was recorded row by row; AIMET writes a grouped weight as PER_BLOCK, its rows in that order."""
    found = encodings.encoding_v1("l.weight", golden_linear("w4_group16"))
    per_block = {"name": "l.weight", "enc_type": "PER_BLOCK", "block_size": 16}
    assert same_json(found, RECORDED["w4_group16"]["encodings"]["1.0.0"] | per_block)


@pytest.mark.parametrize("name", RECORDED_LPBQ)
def test_two_level_entries_are_aimets_lpbq_and_its_plain_groups(name: str):
    """AIMET's own scales: multipliers and channels' scales are found in them to the bit."""
    case, scale = RECORDED_LPBQ[name], load_file(GOLDEN / f"{name}.safetensors")["scale"]
    spec = QuantSpec(bits=case["bits"], group_size=case["group"], decompressed_bits=case["decompressed"])
    codes = torch.zeros(len(scale), scale.shape[1] * case["group"], dtype=torch.int8)
    linear = QuantizedLinear(codes, scale, torch.zeros_like(scale), spec)
    assert same_json(encodings.encoding_v1("l.weight", linear), case["encodings"]["1.0.0"] | {"name": "l.weight"})
    assert same_json(encodings.encoding_torch(linear), case["encodings"]["0.6.1"])


def test_groups_run_along_the_inputs_of_one_output_first():
    scale = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    spec = QuantSpec(bits=4, group_size=4)
    linear = QuantizedLinear(torch.zeros(3, 8, dtype=torch.int8), scale, torch.zeros(3, 2), spec)
    assert encodings.encoding_v1("l.weight", linear)["scale"] == [1, 2, 3, 4, 5, 6]
    assert [row["scale"] for row in encodings.encoding_torch(linear)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("group_size", [None, 8])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_asymmetric_offset_is_the_lower_end_in_steps(bits: int, group_size: int | None):
    linear, low = asymmetric_linear(group_size, bits)
    steps = low.double() / linear.scale_OG.flatten().double()
    v1 = encodings.encoding_v1("l.weight", linear)
    rows = encodings.encoding_torch(linear)
    assert v1["offset"] == [row["offset"] for row in rows]
    assert all(type(offset) is int and offset <= 0 for offset in v1["offset"])
    assert (torch.tensor(v1["offset"]) - steps).abs().max() <= 0.5 + 1e-4  # the nearest; half a step may go either way


@pytest.mark.parametrize("group_size", [None, 8])
def test_asymmetric_entries_say_so_in_each_versions_own_type(group_size: int | None):
    linear, _ = asymmetric_linear(group_size)
    assert encodings.encoding_v1("l.weight", linear)["is_sym"] is False
    assert {row["is_symmetric"] for row in encodings.encoding_torch(linear)} == {"False"}


@pytest.mark.parametrize("group_size", [None, 8])
def test_ends_of_an_asymmetric_grid_hold_every_quantized_weight(group_size: int | None):
    """AIMET rebuilds scale and offset from `min` and `max`: quantizing with those must change nothing."""
    linear, _ = asymmetric_linear(group_size)
    weights = linear.dequantized().reshape(-1, group_size or 32).tolist()
    for row, entry in zip(weights, encodings.encoding_torch(linear), strict=True):
        step = (entry["max"] - entry["min"]) / 15
        offset = round(entry["min"] / step)
        assert offset == entry["offset"]
        codes = [value / step - offset for value in row]
        assert all(abs(code - round(code)) < 1e-4 and 0 <= round(code) <= 15 for code in codes)


def entries_of(linears: dict[str, QuantizedLinear]) -> list[dict]:
    return [encodings.encoding_v1(name, linear) for name, linear in linears.items()]


@pytest.fixture(name="linears")
def _linears() -> dict[str, QuantizedLinear]:
    return {"a.weight": golden_linear("w4_channel"), 'odd "name".weight': asymmetric_linear(8)[0]}


def test_version_1_file_is_json_with_aimets_header(tmp_path, linears):
    encodings.write_v1(tmp_path / "a.encodings", iter(entries_of(linears)))
    expected = {
        "version": "1.0.0",
        "activation_encodings": [],
        "excluded_layers": [],
        "producer": {"package": "shardq", "version": __version__},
        "param_encodings": entries_of(linears),
    }
    assert same_json(json.loads((tmp_path / "a.encodings").read_text()), through_json(expected))


def test_torch_file_is_json_with_the_body_that_aimet_loads(tmp_path, linears):
    rows = {name: encodings.encoding_torch(linear) for name, linear in linears.items()}
    encodings.write_torch(tmp_path / "a_torch.encodings", iter(rows.items()))
    expected = {"activation_encodings": {}, "param_encodings": rows}
    assert same_json(json.loads((tmp_path / "a_torch.encodings").read_text()), through_json(expected))


def test_files_without_entries_are_json_too(tmp_path):
    encodings.write_v1(tmp_path / "a.encodings", [])
    encodings.write_torch(tmp_path / "a_torch.encodings", [])
    assert json.loads((tmp_path / "a.encodings").read_text())["param_encodings"] == []
    assert json.loads((tmp_path / "a_torch.encodings").read_text())["param_encodings"] == {}


def test_merged_files_hold_the_entries_of_every_block_in_order(tmp_path):
    blocks = [{f"layers.{block}.{name}.weight": asymmetric_linear()[0] for name in "qk"} for block in range(3)]
    for number, linears in enumerate(blocks):
        encodings.write_v1(tmp_path / f"{number}.json", entries_of(linears))
        rows = ((name, encodings.encoding_torch(linear)) for name, linear in linears.items())
        encodings.write_torch(tmp_path / f"{number}_torch.json", rows)
    v1 = (entry for number in range(3) for entry in encodings.read_v1(tmp_path / f"{number}.json"))
    encodings.write_v1(tmp_path / "merged", v1)
    torch_rows = (row for number in range(3) for row in encodings.read_torch(tmp_path / f"{number}_torch.json"))
    encodings.write_torch(tmp_path / "merged_torch", torch_rows)
    found = json.loads((tmp_path / "merged").read_text())["param_encodings"]
    assert same_json(found, [entry for linears in blocks for entry in entries_of(linears)])
    found = json.loads((tmp_path / "merged_torch").read_text())["param_encodings"]
    assert list(found) == [name for linears in blocks for name in linears]
    linears = {name: linear for block in blocks for name, linear in block.items()}
    assert all(same_json(found[name], encodings.encoding_torch(linear)) for name, linear in linears.items())


def test_entry_that_fails_half_way_leaves_the_old_file(tmp_path, linears):
    path = tmp_path / "a.encodings"
    encodings.write_v1(path, entries_of(linears))
    before = path.read_bytes()

    def failing():
        yield entries_of(linears)[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encodings.write_v1(path, failing())
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.encodings"]


def test_entries_are_asked_for_one_at_a_time(tmp_path, linears):
    """A model of any depth must fit: each entry is on its way to the file before the next is made."""
    asked = []

    def entries():
        for number in range(50):
            partial = list(tmp_path.iterdir())
            asked.append(partial[0].stat().st_size if partial else 0)
            yield entries_of(linears)[0] | {"name": f"{number}.weight"}

    encodings.write_v1(tmp_path / "a.encodings", entries())
    total = (tmp_path / "a.encodings").stat().st_size
    assert asked[0] == 0
    assert asked[-1] > total / 2


@pytest.mark.parametrize("group_size", [None, 8])
@pytest.mark.parametrize("bits", [2, 4])
def test_full_range_grid_is_the_asymmetric_one_of_the_same_points(bits: int, group_size: int | None):
    spec = QuantSpec(bits=bits, group_size=group_size, full_range=True)
    rows = affine.to_rows(torch.randn(6, 32), spec)
    scale = affine.scale_of(*affine.start_range(rows, spec), spec)
    codes = affine.quantize(rows, scale, torch.zeros_like(scale), spec).reshape(6, 32)
    linear = QuantizedLinear(codes, scale.reshape(6, -1), torch.zeros_like(scale).reshape(6, -1), spec)
    v1 = encodings.encoding_v1("l.weight", linear)
    found = encodings.encoding_torch(linear)
    assert (scale < 0).any() and min(v1["scale"]) > 0 and v1["is_sym"] is False and found[0]["is_symmetric"] == "False"
    for row, row_scale, positive, offset in zip(
        found, scale.flatten().tolist(), v1["scale"], v1["offset"], strict=True
    ):
        points = torch.arange(spec.qmin, spec.qmax + 1) * row_scale
        described = (torch.arange(2**bits) + offset) * positive
        assert torch.equal(described, points.sort().values)
        assert (row["min"], row["max"]) == (points.min().item(), points.max().item())


ACTIVATIONS = json.loads((GOLDEN / "activations.json").read_text())["encodings"]


def activation_grid(case: str) -> ActivationGrid:
    values, (bits, kind) = load_file(GOLDEN / "activations.safetensors")["outlier"], case.split()
    return grid_between(values.min(), values.max(), QuantSpec(bits=int(bits), symmetric=kind == "symmetric"))


@pytest.mark.parametrize("case", ACTIVATIONS)
def test_entries_of_activations_are_aimets(case: str):
    grids = {"block.fc.input": activation_grid(case)}
    (v1,), recorded = encodings.activations_v1(grids), ACTIVATIONS[case]
    assert same_json(v1, recorded["1.0.0"] | {"name": "block.fc.input"})
    assert list(v1)[1:] == list(recorded["1.0.0"])
    row = encodings.activations_torch(grids)["block.fc"]["input"]["0"]
    assert same_json(row, recorded["0.6.1"][0]) and list(row) == list(recorded["0.6.1"][0])


def test_activations_lie_under_their_modules_and_only_static_ones_are_listed():
    static, by_token = ActivationGrid(8, True, 0.5, 0), ActivationGrid(8, True)
    names = ["b.input", "b.fc.input", "b.fc.output", "b.attn.query", "b.attn.context"]
    grids = dict.fromkeys(names, static) | {"b.norm.output": by_token}
    assert [entry["name"] for entry in encodings.activations_v1(grids)] == names
    by_module = encodings.activations_torch(grids)
    assert {module: list(sides) for module, sides in by_module.items()} == {"b": ["input"], "b.fc": ["input", "output"]}


def test_files_give_activations_back_beside_the_weights(tmp_path: Path):
    grids = {"b.fc.input": ActivationGrid(8, False, 0.25, 3), "b.fc.output": ActivationGrid(16, True, 1e-3, 0)}
    linear, _ = asymmetric_linear()
    entry, rows = encodings.encoding_v1("b.fc.weight", linear), encodings.encoding_torch(linear)
    encodings.write_v1(tmp_path / "v1", [entry], grids)
    encodings.write_torch(tmp_path / "torch", [("b.fc.weight", rows)], grids)
    for path, made in ((tmp_path / "v1", encodings.activations_v1(grids)),
                       (tmp_path / "torch", encodings.activations_torch(grids))):  # fmt: skip
        assert encodings.read_activation_entries(path) == made == json.loads(path.read_text())["activation_encodings"]
    assert list(encodings.read_v1(tmp_path / "v1")) == [entry]
    assert list(encodings.read_torch(tmp_path / "torch")) == [("b.fc.weight", rows)]
