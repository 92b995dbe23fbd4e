"""AdaScale's forward, gradients and fold, against AIMET's recorded tensors and against plain autograd."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import tiny
from shardq.compiling import compiler, why_not
from shardq.quant import adascale
from shardq.quant.adascale import Kernels, Trained
from shardq.quant.integer_grid import IntegerGrid

GOLDEN = Path(__file__).parents[1] / "golden"
PARAMETERS = ("s2", "s3", "beta", "gamma")
FLOAT32_ROUNDING = {"rtol": 2e-6, "atol": 2e-7}
EXP_ROUNDING = {"rtol": 5e-7, "atol": 0}  # of two exponentials: processors' libraries differ in their last bit
PLAIN = Kernels()

Parameters = dict[str, Tensor]


@pytest.fixture(params=tiny.GOLDEN_GRIDS, name="golden")
def _golden(request) -> tuple[dict[str, Tensor], IntegerGrid]:
    return load_file(GOLDEN / f"{request.param}.safetensors"), tiny.GOLDEN_GRIDS[request.param]


def trained(tensors: dict[str, Tensor]) -> Parameters:
    return {name: tensors[name].clone().requires_grad_() for name in PARAMETERS}


def fake_quantized(
    rows: Tensor,
    start: tuple[Tensor, Tensor],
    parameters: Parameters,
    grid: IntegerGrid,
    dtype: torch.dtype = torch.float32,
    kernels: Kernels = PLAIN,
) -> Tensor:
    return adascale.FakeQuantize.apply(kernels, grid, 1, dtype, rows, *start, *as_trained(parameters))


def as_trained(parameters: Parameters) -> Trained:
    return Trained(*(parameters[name] for name in PARAMETERS))


def test_output_is_aimets(golden):
    tensors, grid = golden
    output = fake_quantized(tensors["weight"], (tensors["min0"], tensors["max0"]), trained(tensors), grid)
    torch.testing.assert_close(output.detach(), tensors["output"], **FLOAT32_ROUNDING)


def test_gradients_are_aimets(golden):
    tensors, grid = golden
    parameters = trained(tensors)
    output = fake_quantized(tensors["weight"], (tensors["min0"], tensors["max0"]), parameters, grid)
    output.backward(tensors["grad_output"])
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter.grad, tensors[f"grad_{name}"], **FLOAT32_ROUNDING)


def test_folded_weight_and_codes_are_aimets(golden):
    tensors, grid = golden
    scales = (tensors["folded_scale"], torch.zeros_like(tensors["folded_scale"]))
    codes = adascale.fold(tensors["weight"], tensors["s2"], tensors["s3"], *scales, grid)
    divided = adascale.divided_weight(tensors["weight"], tensors["s2"], tensors["s3"])
    torch.testing.assert_close(divided, tensors["folded_weight"], **EXP_ROUNDING)
    torch.testing.assert_close(codes.float() * tensors["folded_scale"], tensors["folded_output"], **FLOAT32_ROUNDING)


def test_folded_grid_is_aimets(golden):
    tensors, grid = golden
    scale, zero_point = adascale.learned_grid((tensors["min0"], tensors["max0"]), as_trained(tensors), grid)
    torch.testing.assert_close(scale, tensors["folded_scale"], rtol=2e-6, atol=0)
    torch.testing.assert_close(zero_point, -tensors["folded_offset"], rtol=0, atol=0)


def test_compiled_kernels_give_aimets_output_and_gradients():
    if reason := why_not(torch.device("cpu")):
        pytest.skip(reason)
    refused: list[str] = []
    compiled = compiler(torch.device("cpu"), refused.append)
    kernels = Kernels(*(compiled(kernel, True) for kernel in PLAIN))
    for name in ("w4_channel", "w4_group16"):
        tensors, grid = load_file(GOLDEN / f"{name}.safetensors"), tiny.GOLDEN_GRIDS[name]
        parameters = trained(tensors)
        output = fake_quantized(
            tensors["weight"], (tensors["min0"], tensors["max0"]), parameters, grid, kernels=kernels
        )
        output.backward(tensors["grad_output"])
        actual = {"output": output.detach()} | {f"grad_{key}": value.grad for key, value in parameters.items()}
        for key, value in actual.items():
            is_sum = key not in ("output", "grad_s2")  # over a row: some cancel out, and leave rounding alone
            atol = 1e-6 * tensors[key].abs().max().item() if is_sum else 0
            torch.testing.assert_close(value, tensors[key], rtol=1e-6, atol=atol)
    assert not refused, "the plain functions ran in their place"


# Below: shapes, widths and grids that AIMET cannot do, against the formulas written out for plain autograd.


def straight_through_round(values: Tensor) -> Tensor:
    return values + (values.round() - values).detach()


def naive_fake_quantized(
    rows: Tensor, start: tuple[Tensor, Tensor], parameters: Parameters, bits: int, symmetric: bool
) -> Tensor:
    qmin, qmax = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    low, high = parameters["beta"].exp() * start[0], parameters["gamma"].exp() * start[1]
    scale = ((high - low) / (2**bits - 1)).clamp(min=torch.finfo(torch.float32).eps)
    zero_point = straight_through_round((qmin - low / scale).clamp(qmin, qmax)) if not symmetric else 0.0
    divided = rows / parameters["s2"].exp() / parameters["s3"].exp()
    return scale * ((straight_through_round(divided / scale) + zero_point).clamp(qmin, qmax) - zero_point)


def awkward_weight(num_outputs: int, num_inputs: int) -> Tensor:
    """Normal rows, and rows that are zero, constant, of one sign, tiny, or ruled by an outlier."""
    weight = torch.randn(num_outputs, num_inputs)
    weight[0] = 0
    weight[1], weight[2] = 0.3, -0.3
    weight[3], weight[4] = weight[3].abs(), -weight[4].abs()
    weight[5] *= 1e-9
    weight[6, 7] = 100.0
    return weight


def random_parameters(rows: Tensor) -> Parameters:
    column = rows[:, :1]
    sizes = {"s2": (rows, 0.2), "s3": (column, 0.2), "beta": (column, 0.3), "gamma": (column, 0.3)}
    return {name: (torch.randn_like(like) * size).requires_grad_() for name, (like, size) in sizes.items()}


def assert_same_gradients(ours: Parameters, naive: Parameters, rows: Tensor) -> None:
    """Equal within float32 rounding; those of the row values are sums over a row."""
    largest = rows.abs().amax().item()
    for name in ours:
        atol = 2e-6 * largest * (1 if name == "s2" else rows.shape[1] ** 0.5)
        torch.testing.assert_close(ours[name].grad, naive[name].grad, rtol=1e-5, atol=atol)


@pytest.mark.parametrize("group_size", [None, 32, 64, 128])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_output_and_gradients_are_those_of_plain_autograd(bits: int, symmetric: bool, group_size: int | None):
    grid = IntegerGrid(bits=bits, symmetric=symmetric, group_size=group_size)
    rows = awkward_weight(11, 256).reshape(-1, group_size or 256)
    start = grid.start_range(rows)
    ours = random_parameters(rows)
    naive = {name: value.detach().clone().requires_grad_() for name, value in ours.items()}
    output = fake_quantized(rows, start, ours, grid)
    expected = naive_fake_quantized(rows, start, naive, bits, symmetric)
    torch.testing.assert_close(output, expected, rtol=1e-6, atol=1e-7)
    grad_output = torch.randn_like(rows)
    output.backward(grad_output)
    expected.backward(grad_output)
    assert_same_gradients(ours, naive, rows)


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_bfloat16_weight_is_computed_in_float32_and_rounded_at_the_end(symmetric: bool):
    grid = IntegerGrid(bits=4, symmetric=symmetric)
    rows = awkward_weight(11, 64).bfloat16()
    start = grid.start_range(rows.float())
    ours = random_parameters(rows.float())
    naive = {name: value.detach().clone().requires_grad_() for name, value in ours.items()}
    output = fake_quantized(rows, start, ours, grid, torch.bfloat16)
    expected = naive_fake_quantized(rows.float(), start, naive, 4, symmetric)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), expected, rtol=2**-8, atol=1e-7)  # half a step of bfloat16
    grad_output = torch.randn_like(rows)
    output.backward(grad_output)
    expected.backward(grad_output.float())
    assert all(value.grad.dtype == torch.float32 for value in ours.values())
    assert_same_gradients(ours, naive, rows)


def gradients_by_hand(zero_point: float, symmetric: bool) -> tuple[list[float], float]:
    """Gradients of s2 and of the scale for 3 bits, step 1, and 1 passed back to every weight."""
    rows = torch.tensor([[-4.6, -4.4, -3.4, 0.25, 3.4, 3.6]])
    scale, s2, s3 = torch.ones(1, 1), torch.zeros(1, 6), torch.zeros(1, 1)
    grad_s2, _, grad_scale, _ = adascale.fake_quantized_gradients(
        torch.ones(1, 6), rows, s2, s3, scale, torch.tensor([[zero_point]]), IntegerGrid(bits=3, symmetric=symmetric)
    )
    return grad_s2[0].tolist(), grad_scale.item()


def test_clamped_weights_get_no_gradient_on_a_symmetric_grid():
    s2, scale = gradients_by_hand(0.0, symmetric=True)  # grid -4 ... 3
    assert s2 == pytest.approx([0, 4.4, 3.4, -0.25, -3.4, 0])
    assert scale == pytest.approx(-4 + 0.4 + 0.4 - 0.25 - 0.4 + 3)  # rounded - exact inside, the end outside


def test_clamped_weights_get_no_gradient_on_an_asymmetric_grid():
    s2, scale = gradients_by_hand(-1.0, symmetric=False)  # grid -3 ... 4
    assert s2 == pytest.approx([0, 0, 3.4, -0.25, -3.4, -3.6])
    assert scale == pytest.approx(-3 - 3 + 0.4 - 0.25 - 0.4 + 0.4)


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_one_shared_step_scales_the_grid_and_keeps_its_zero_point(bits: int, symmetric: bool):
    """FlexRound: both ends move together, so the step is the only thing learned about the grid."""
    grid = IntegerGrid(bits=bits, symmetric=symmetric)
    rows = awkward_weight(11, 64)[3:]  # rows at the smallest scale have no step to learn
    rows = torch.cat([rows[:2], rows[3:]])
    start = grid.start_range(rows)
    step = (torch.randn(len(rows), 1) * 0.3).requires_grad_()
    scale, zero_point = adascale.learned_grid(start, Trained(None, None, step, step), grid)
    start_scale = (start[1] - start[0]) / (2**bits - 1)
    start_zero_point = 0 * start_scale if symmetric else torch.round(-(2 ** (bits - 1)) - start[0] / start_scale)
    torch.testing.assert_close(scale, step.exp() * start_scale, rtol=1e-6, atol=0)
    torch.testing.assert_close(zero_point, start_zero_point, rtol=0, atol=0)


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_gradient_of_a_shared_step_is_that_of_plain_autograd(symmetric: bool):
    grid = IntegerGrid(bits=3, symmetric=symmetric)
    rows = awkward_weight(11, 64)
    start = grid.start_range(rows)
    ours = random_parameters(rows)
    naive = {name: ours[name].detach().clone().requires_grad_() for name in ("s2", "s3", "beta")}
    grad_output = torch.randn_like(rows)
    fake_quantized(rows, start, ours | {"gamma": ours["beta"]}, grid).backward(grad_output)
    naive_fake_quantized(rows, start, naive | {"gamma": naive["beta"]}, 3, symmetric).backward(grad_output)
    assert_same_gradients({name: ours[name] for name in naive}, naive, rows)


@pytest.mark.parametrize("full_range", [False, True])
def test_rounding_of_scales_passes_gradients_straight_through(full_range: bool):
    rounded = IntegerGrid(bits=4, full_range=full_range, scale_dtype="bfloat16")
    exact = IntegerGrid(bits=4, full_range=full_range)
    rows = awkward_weight(11, 64)
    start, parameters = exact.start_range(rows), random_parameters(rows)
    trained = as_trained(parameters)
    scale, grad_scale = adascale.learned_grid(start, trained, rounded)[0], torch.randn(len(rows), 1)
    found = adascale.learned_grid_gradients(grad_scale, torch.zeros(len(rows), 1), scale, start, trained, rounded)
    adascale.learned_grid(start, trained, exact)[0].backward(grad_scale)
    for name, gradient in zip(("beta", "gamma"), found, strict=True):
        torch.testing.assert_close(gradient, parameters[name].grad, rtol=1e-6, atol=0)


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_untrained_weight_leaves_only_the_grid_to_learn(symmetric: bool):
    """Learned clipping alone: without s2 and s3 everything is as with both at 0."""
    grid = IntegerGrid(bits=4, symmetric=symmetric)
    rows = awkward_weight(11, 64)
    start = grid.start_range(rows)
    ours = random_parameters(rows) | {"s2": None, "s3": None}
    naive = {name: ours[name].detach().clone().requires_grad_() for name in ("beta", "gamma")}
    expected = naive_fake_quantized(
        rows, start, naive | {"s2": torch.zeros(1), "s3": torch.zeros(1)}, grid.bits, symmetric
    )
    output = fake_quantized(rows, start, ours, grid)
    torch.testing.assert_close(output, expected, rtol=1e-6, atol=1e-7)
    output.backward(torch.ones_like(rows))
    expected.backward(torch.ones_like(rows))
    assert_same_gradients({name: ours[name] for name in naive}, naive, rows)


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_fold_gives_the_weight_that_was_trained(bits: int, symmetric: bool):
    grid = IntegerGrid(bits=bits, symmetric=symmetric)
    rows = awkward_weight(11, 64)
    start, parameters = grid.start_range(rows), random_parameters(rows)
    with torch.no_grad():
        expected = naive_fake_quantized(rows, start, parameters, bits, symmetric)
        scales = adascale.learned_grid(start, as_trained(parameters), grid)
        codes = adascale.fold(rows, parameters["s2"], parameters["s3"], *scales, grid)
    assert codes.dtype == torch.int8
    assert -(2 ** (bits - 1)) <= codes.min() and codes.max() <= 2 ** (bits - 1) - 1
    torch.testing.assert_close((codes - scales[1]) * scales[0], expected, rtol=1e-6, atol=1e-7)


def test_inputs_are_left_as_they_were():
    grid = IntegerGrid(bits=4, symmetric=False)
    rows = awkward_weight(11, 64)
    start, parameters = grid.start_range(rows), random_parameters(rows)
    inputs = {"rows": rows, "min": start[0], "max": start[1]} | parameters
    before = {name: tensor.detach().clone() for name, tensor in inputs.items()}
    grad_output = torch.ones_like(rows)
    fake_quantized(rows, start, parameters, grid).backward(grad_output)
    fake_quantized(rows, start, parameters | {"s2": None, "s3": None}, grid).backward(grad_output)
    for name, tensor in inputs.items():
        assert torch.equal(tensor.detach(), before[name]), name
    assert torch.equal(grad_output, torch.ones_like(rows))


def bytes_kept(forward, num_rows: int) -> dict[int, int]:
    """Size of each storage, by address, that a graph keeps for its backward pass, beside values of a row."""
    kept: list[Tensor] = []  # holds the tensors, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    assert output.grad_fn is not None
    attributes = getattr(output.grad_fn, "__dict__", {})  # tensors put on `ctx` itself escape the hooks
    own = [value for value in attributes.values() if isinstance(value, Tensor)]
    storages = [tensor.untyped_storage() for tensor in kept + own]
    return {storage.data_ptr(): storage.nbytes() for storage in storages if storage.nbytes() > 4 * num_rows}


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_six_bytes_a_16_bit_weight_are_kept_for_backward(symmetric: bool):
    """The weight and s2 themselves, which are there anyway: no copy, nothing computed."""
    grid = IntegerGrid(bits=4, symmetric=symmetric)
    rows = awkward_weight(11, 64).bfloat16()
    start, parameters = grid.start_range(rows.float()), random_parameters(rows.float())
    kept = bytes_kept(lambda: fake_quantized(rows, start, parameters, grid, torch.bfloat16), len(rows))
    assert sum(kept.values()) <= 6 * rows.numel()
    assert set(kept) == {rows.data_ptr(), parameters["s2"].data_ptr()}
    naive = bytes_kept(lambda: naive_fake_quantized(rows, start, parameters, 4, symmetric).bfloat16(), len(rows))
    assert sum(naive.values()) > 12 * rows.numel()  # what the saving is worth, and proof that this test would see it
