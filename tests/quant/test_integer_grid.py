"""Min-max grids, codes and grid points, against AIMET's recorded tensors and a search over the whole grid."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import tiny
from shardq.quant.activation import ActivationLevels
from shardq.quant.grid import SCALE_FLOOR
from shardq.quant.integer_grid import IntegerGrid
from shardq.quant.quantized import QuantizedLinear

GOLDEN = Path(__file__).parents[1] / "golden"
GRIDS = [
    pytest.param(IntegerGrid(bits=bits, symmetric=symmetric), id=f"{bits}-{'' if symmetric else 'a'}symmetric")
    for bits in range(2, 9)
    for symmetric in (True, False)
]


@pytest.fixture(params=tiny.GOLDEN_GRIDS, name="golden")
def _golden(request) -> tuple[dict[str, Tensor], IntegerGrid]:
    return load_file(GOLDEN / f"{request.param}.safetensors"), tiny.GOLDEN_GRIDS[request.param]


def test_start_range_is_aimets(golden):
    tensors, grid = golden
    low, high = grid.start_range(tensors["weight"])
    torch.testing.assert_close(low, tensors["min0"], rtol=1e-6, atol=0)
    torch.testing.assert_close(high, tensors["max0"], rtol=1e-6, atol=0)


def test_start_scale_is_aimets(golden):
    tensors, grid = golden
    low, high = grid.start_range(tensors["weight"])
    torch.testing.assert_close(grid.scale_of(low, high), tensors["rtn_scale"], rtol=1e-6, atol=0)


def test_round_to_nearest_is_aimets(golden):
    tensors, grid = golden
    rows = tensors["weight"]
    scale, zero_point = start_grid(rows, grid)
    rounded = grid.decode(grid.encode(rows, scale, zero_point), scale, zero_point)
    torch.testing.assert_close(rounded, tensors["rtn"], rtol=1e-6, atol=0)


def start_grid(rows: Tensor, grid: IntegerGrid) -> tuple[Tensor, Tensor]:
    low, high = grid.start_range(rows)
    scale = grid.scale_of(low, high)
    return scale, grid.zero_point_of(low, scale)


def awkward_rows() -> Tensor:
    """Normal rows, and rows of one sign, shifted, tiny, zero, constant, or ruled by an outlier."""
    rows = torch.randn(9, 128)
    rows[1], rows[2] = rows[1].abs(), -rows[2].abs()
    rows[3] += 3
    rows[4] *= 1e-9
    rows[5] = 0
    rows[6], rows[7] = 0.7, -0.7
    rows[8, 3] = 100
    return rows


def whole_grid(scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Every grid point of each row [R, 2^b], in float64."""
    codes = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1), dtype=torch.float64)
    return (codes - zero_point.double()) * scale.double()


@pytest.mark.parametrize("grid", GRIDS)
def test_every_weight_goes_to_the_nearest_grid_point(grid: IntegerGrid):
    rows = awkward_rows()
    scale, zero_point = start_grid(rows, grid)
    rounded = grid.decode(grid.encode(rows, scale, zero_point), scale, zero_point)
    distances = (rows.double()[:, :, None] - whole_grid(scale, zero_point, grid.bits)[:, None, :]).abs()
    found = (rows.double() - rounded.double()).abs()
    assert (found <= distances.amin(2) + 1e-6 * rows.double().abs() + 1e-6 * scale.double()).all()


@pytest.mark.parametrize("grid", GRIDS)
def test_zero_is_on_the_grid_and_stays_zero(grid: IntegerGrid):
    rows = awkward_rows()
    scale, zero_point = start_grid(rows, grid)
    assert (whole_grid(scale, zero_point, grid.bits) == 0).any(1).all()
    zeros = torch.zeros_like(rows)
    rounded = grid.decode(grid.encode(zeros, scale, zero_point), scale, zero_point)
    assert (rounded == 0).all()


@pytest.mark.parametrize("grid", GRIDS)
def test_grid_points_quantize_to_their_own_codes(grid: IntegerGrid):
    scale, zero_point = start_grid(awkward_rows(), grid)
    codes = torch.arange(-(2 ** (grid.bits - 1)), 2 ** (grid.bits - 1), dtype=torch.int8).expand(len(scale), -1)
    points = grid.decode(codes, scale, zero_point)
    assert torch.equal(grid.encode(points, scale, zero_point), codes)


@pytest.mark.parametrize("grid", GRIDS)
def test_values_beyond_the_ends_take_the_end_codes(grid: IntegerGrid):
    scale, zero_point = start_grid(awkward_rows(), grid)
    far = torch.tensor([[-1e6, 1e6]]).expand(len(scale), 2)
    expected = torch.tensor([-(2 ** (grid.bits - 1)), 2 ** (grid.bits - 1) - 1], dtype=torch.int8)
    assert torch.equal(grid.encode(far, scale, zero_point), expected.expand(len(scale), 2))


@pytest.mark.parametrize("bits", range(2, 9))
def test_asymmetric_range_is_that_of_the_row_and_zero(bits: int):
    rows = awkward_rows()[[0, 1, 2, 3, 6, 7, 8]]  # the others are at the smallest scale
    low, high = IntegerGrid(bits=bits, symmetric=False).start_range(rows)
    assert low.flatten().tolist() == [min(0, row.min().item()) for row in rows]
    assert high.flatten().tolist() == [max(0, row.max().item()) for row in rows]


@pytest.mark.parametrize("bits", range(3, 9))
def test_symmetric_range_is_the_smallest_that_holds_the_row(bits: int):
    rows = awkward_rows()[[0, 1, 2, 3, 6, 7, 8]]
    low, high = IntegerGrid(bits=bits).start_range(rows)
    slack = 1 + 1e-6
    assert (low * slack <= rows).all() and (rows <= high * slack).all()
    touches = ((rows - low).abs() < 1e-5 * high).any(1) | ((rows - high).abs() < 1e-5 * high).any(1)
    assert touches.all()
    torch.testing.assert_close(low / -(2 ** (bits - 1)), high / (2 ** (bits - 1) - 1))


def test_two_bits_symmetric_clip_the_upper_end_by_one_step():
    low, high = IntegerGrid(bits=2).start_range(torch.tensor([[-1.0, 0.5], [-0.5, 1.0]]))
    assert low.flatten().tolist() == [-1.0, -1.0]
    assert high.flatten().tolist() == [0.5, 0.5]


@pytest.mark.parametrize("grid", GRIDS)
def test_scale_of_zeros_is_small_but_positive(grid: IntegerGrid):
    scale, zero_point = start_grid(torch.zeros(2, 8), grid)
    torch.testing.assert_close(scale, torch.full((2, 1), torch.finfo(torch.float32).eps))
    assert torch.isfinite(zero_point).all()


@pytest.mark.parametrize("grid", GRIDS)
def test_range_of_zeros_is_one_smallest_step_a_code(grid: IntegerGrid):
    low, high = grid.start_range(torch.zeros(2, 8))
    step = torch.finfo(torch.float32).eps
    assert low.flatten().tolist() == [-(2 ** (grid.bits - 1)) * step] * 2
    assert high.flatten().tolist() == [(2 ** (grid.bits - 1) - 1) * step] * 2


def test_scale_never_falls_below_the_floor():
    tiny = torch.tensor([[1e-30]])
    grid = IntegerGrid(bits=4)
    assert grid.scale_of(-tiny, tiny).item() == torch.finfo(torch.float32).eps


@pytest.mark.parametrize("bits", range(2, 9))
def test_zero_point_is_an_integer_of_the_codes_range(bits: int):
    grid = IntegerGrid(bits=bits, symmetric=False)
    low, high = -torch.rand(500, 1), torch.rand(500, 1)
    zero_point = grid.zero_point_of(low, grid.scale_of(low, high))
    expected = [
        round(-(2 ** (bits - 1)) - one_low / ((one_high - one_low) / (2**bits - 1)))
        for one_low, one_high in zip(low.flatten().tolist(), high.flatten().tolist(), strict=True)
    ]
    assert zero_point.flatten().tolist() == expected


def test_rows_are_neighbouring_input_channels():
    weight = torch.arange(24).reshape(2, 12)
    assert torch.equal(IntegerGrid(bits=4).rows(weight), weight)
    grouped = IntegerGrid(bits=4, group_size=4).rows(weight)
    assert grouped.tolist() == [list(range(start, start + 4)) for start in range(0, 24, 4)]


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_dequantized_linear_is_that_of_a_loop_over_its_elements(symmetric: bool):
    grid = IntegerGrid(bits=4, symmetric=symmetric, group_size=3)
    codes = torch.randint(-8, 8, (5, 12), dtype=torch.int8)
    scale, zero_point = torch.rand(5, 4), torch.randint(-8, 8, (5, 4)).float() * (not symmetric)
    weight = QuantizedLinear(codes, scale, zero_point, grid).dequantized()
    for o in range(5):
        for i in range(12):
            expected = (codes[o, i].item() - zero_point[o, i // 3].item()) * scale[o, i // 3].item()
            assert weight[o, i].item() == pytest.approx(expected, rel=1e-6)


FULL_RANGE = [IntegerGrid(bits=bits, full_range=True, group_size=size) for bits in (2, 3, 4, 8) for size in (None, 16)]


@pytest.mark.parametrize("grid", FULL_RANGE, ids=str)
def test_full_range_grid_ends_at_the_value_furthest_from_zero(grid: IntegerGrid):
    rows = grid.rows(torch.randn(12, 32))
    scale, zero_point = start_grid(rows, grid)
    furthest = rows.gather(1, rows.abs().argmax(1, keepdim=True))
    torch.testing.assert_close(grid.qmin * scale, furthest)
    assert (scale < 0).any() and (scale > 0).any() and not zero_point.any()
    codes = grid.encode(rows, scale, zero_point)
    nearest = ((torch.arange(grid.qmin, grid.qmax + 1) * scale)[:, None] - rows[..., None]).abs().amin(-1)
    error = (grid.decode(codes, scale, zero_point) - rows).abs()
    torch.testing.assert_close(error, nearest, rtol=0, atol=1e-6)


@pytest.mark.parametrize("grid", FULL_RANGE, ids=str)
def test_full_range_grid_of_the_negated_weight_is_the_negated_grid(grid: IntegerGrid):
    rows = grid.rows(torch.randn(12, 32))
    (scale, zero_point), (negated, _) = start_grid(rows, grid), start_grid(-rows, grid)
    assert torch.equal(negated, -scale)
    assert torch.equal(grid.encode(rows, scale, zero_point), grid.encode(-rows, -scale, zero_point))


def test_full_range_step_is_finer_than_the_symmetric_one_where_the_upper_end_is_further():
    rows = torch.tensor([[-1.0, 2.0], [-2.0, 1.0]])
    full, usual = (start_grid(rows, IntegerGrid(bits=3, full_range=flag))[0] for flag in (True, False))
    assert full.flatten().tolist() == [-0.5, 0.5]
    torch.testing.assert_close(usual.flatten(), torch.tensor([2 / 3, 0.5]))


def test_full_range_row_of_zeros_has_a_scale():
    scale, _ = start_grid(torch.zeros(3, 8), IntegerGrid(bits=4, full_range=True))
    assert (scale == SCALE_FLOOR).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("full_range", [False, True])
def test_scale_is_the_nearest_that_its_dtype_holds(dtype: str, full_range: bool):
    rows = torch.randn(200, 16) * torch.logspace(-7, 1, 200).unsqueeze(1)
    exact_grid = IntegerGrid(bits=4, full_range=full_range)
    ends = exact_grid.start_range(rows)
    exact = exact_grid.scale_of(*ends)
    rounded = IntegerGrid(bits=4, full_range=full_range, scale_dtype=dtype).scale_of(*ends)
    assert torch.equal(rounded, exact.to(getattr(torch, dtype)).float())
    assert (rounded != 0).all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 1}, "bits: 1 is not allowed, it must be between 2 and 8"),
        ({"bits": 9}, "bits: 9 is not allowed, it must be between 2 and 8"),
        ({"group_size": 1}, "group_size: 1 is not allowed, it must be at least 2"),
        ({"group_size": -1}, "group_size: -1 is not allowed"),
        ({"scale_dtype": "float8"}, "scale_dtype: float8 is not allowed, it must be one of bfloat16, float16"),
        ({"symmetric": False, "full_range": True}, "full_range: True is not allowed, it must be false"),
        ({"decompressed_bits": 8}, "decompressed_bits: 8 is not allowed, it must be left out but for"),
        ({"group_size": 8, "decompressed_bits": 8, "symmetric": False}, "decompressed_bits: 8 is not allowed"),
        ({"group_size": 8, "decompressed_bits": 8, "full_range": True}, "decompressed_bits: 8 is not allowed"),
        ({"group_size": 8, "decompressed_bits": 4}, r"above bits \(4\), at most 16"),
        ({"group_size": 8, "decompressed_bits": 17}, r"above bits \(4\), at most 16"),
        ({"group_size": 8, "decompressed_bits": 8, "scale_dtype": "float16"}, "no whole multiples"),
    ],
    ids=str,
)
def test_grid_that_cannot_be_is_not_built(fields: dict, message: str):
    with pytest.raises(ValueError, match=message):
        IntegerGrid(**{"bits": 4} | fields)


def test_activations_may_have_wider_codes():
    assert ActivationLevels(bits=16).qmax == 32767
    with pytest.raises(ValueError, match="between 2 and 16"):
        ActivationLevels(bits=17)


def test_grid_says_what_it_takes_and_what_it_is_called():
    plain, grouped = IntegerGrid(bits=4), IntegerGrid(bits=3, symmetric=False, group_size=8)
    assert (plain.name, plain.description) == ("w4", "symmetric, per-channel")
    assert (grouped.name, grouped.description) == ("w3-g8", "asymmetric, in groups of 8")
    assert (plain.num_scales(6, 32), grouped.num_scales(6, 32)) == (6, 24)
    assert plain.divides(31) and grouped.divides(32) and not grouped.divides(31)
    assert IntegerGrid(**grouped.as_dict()) == grouped


@pytest.mark.parametrize("grid", [*GRIDS, *(pytest.param(grid, id=str(grid)) for grid in FULL_RANGE)])
def test_nearest_levels_are_those_that_codes_stand_for(grid: IntegerGrid):
    rows = grid.rows(awkward_rows())
    scale, zero_point = start_grid(rows, grid)
    levels = grid.nearest(rows / scale, zero_point)
    assert torch.equal(levels * scale, grid.decode(grid.encode(rows, scale, zero_point), scale, zero_point))
    is_beyond = (rows / scale - levels).abs() > 0.5
    assert torch.equal(grid.is_inside(rows / scale, levels), ~is_beyond)
    assert grid.allows_scales(scale) and grid.allows_zero_points(zero_point)
    assert not grid.allows_scales(0 * scale) and not grid.allows_zero_points(zero_point + 2**grid.bits)
