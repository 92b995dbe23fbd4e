"""Weights in ONNX graphs, run by onnxruntime beside the same weights in torch."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

import tiny
from shardq.formats import onnx_graph
from shardq.quant.integer_grid import IntegerGrid

OUTPUTS, INPUTS = 24, 64
GRIDS = [IntegerGrid(bits=bits, group_size=size) for bits in range(2, 9) for size in (None, 32)]
GRIDS += [IntegerGrid(bits=bits, symmetric=False, group_size=size) for bits in (2, 3, 4, 8) for size in (None, 16, 2)]
GRIDS += [IntegerGrid(bits=bits, full_range=True, group_size=size) for bits in (2, 4) for size in (None, 32)]


def weight_graph(consume: str, opset: int) -> ir.Model:
    """`x` times the weight `a.weight` [O, I], which has no value yet, as torch's exporter writes it, or by Gemm."""
    nodes = {
        "MatMul": [onnx.helper.make_node("Transpose", ["a.weight"], ["t"], perm=[1, 0]),
                   onnx.helper.make_node("MatMul", ["x", "t"], ["y"])],
        "Gemm": [onnx.helper.make_node("Gemm", ["x", "a.weight"], ["y"], transB=1)],
    }[consume]  # fmt: skip
    info = onnx.helper.make_tensor_value_info
    inputs = [info("x", 1, [3, INPUTS]), info("a.weight", 1, [OUTPUTS, INPUTS])]
    graph = onnx.helper.make_graph(nodes, "graph", inputs, [info("y", 1, [3, OUTPUTS])])
    model = ir.from_proto(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)]))
    weight = model.graph.inputs.pop()
    model.graph.initializers.add(weight)
    return model


def run(path: Path, x: torch.Tensor) -> torch.Tensor:
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


@pytest.mark.parametrize("consume", ["MatMul", "Gemm"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_every_grid_is_multiplied_by_as_it_is(grid: IntegerGrid, consume: str, tmp_path: Path):
    linear = tiny.random_linear(grid, (OUTPUTS, INPUTS))
    model = weight_graph(consume, onnx_graph.opset_for(grid))
    placed = onnx_graph.write_data(tmp_path / "weights.data", onnx_graph.linear_tensors("a", linear))
    onnx_graph.place_weights(model.graph, placed, {"a": grid})
    onnx_graph.write_model(tmp_path / "model.onnx", model)
    onnx.checker.check_model(tmp_path / "model.onnx", full_check=True)
    x = torch.randn(3, INPUTS)
    expected = x @ linear.dequantized().T
    assert (run(tmp_path / "model.onnx", x) - expected).abs().max() < 2e-6 * expected.abs().max()
    packed = {2: 4, 3: 2, 4: 2}.get(grid.bits, 1)
    assert placed["a.codes"].nbytes == OUTPUTS * INPUTS / packed
    assert (tmp_path / "weights.data").stat().st_size >= sum(tensor.nbytes for tensor in placed.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_plain_weight_keeps_its_dtype_on_disk(dtype: torch.dtype, tmp_path: Path):
    weight = torch.randn(OUTPUTS, INPUTS).to(dtype)
    model = weight_graph("MatMul", 21)
    placed = onnx_graph.write_data(tmp_path / "weights.data", [onnx_graph.plain_tensor("a.weight", weight)])
    onnx_graph.place_weights(model.graph, placed, {})
    onnx_graph.write_model(tmp_path / "model.onnx", model)
    x = torch.randn(3, INPUTS)
    assert torch.allclose(run(tmp_path / "model.onnx", x), x @ weight.float().T, rtol=1e-5, atol=1e-5)
    assert (tmp_path / "weights.data").stat().st_size == weight.nbytes


def test_tensors_start_on_pages_and_are_made_one_at_a_time(tmp_path: Path):
    def tensors():
        for number in range(3):
            seen.append(number)
            yield onnx_graph.plain_tensor(f"t{number}", torch.full((5,), float(number)))

    seen: list[int] = []
    placed = onnx_graph.write_data(tmp_path / "t.data", tensors())
    assert [tensor.offset for tensor in placed.values()] == [0, 4096, 8192] and seen == [0, 1, 2]
    assert all(np.array_equal(tensor.numpy(), np.full(5, name[1], np.float32)) for name, tensor in placed.items())


def step(name: str, entering: str, leaving: str) -> ir.Model:
    """A part: what enters plus a constant, times the mask; both constants and inner values have the same names."""
    nodes = [onnx.helper.make_node("Add", [entering, "c"], ["inner"], name="n"),
             onnx.helper.make_node("Mul", ["inner", "mask"], [leaving], name="m")]  # fmt: skip
    info = onnx.helper.make_tensor_value_info
    constant = onnx.numpy_helper.from_array(np.float32(len(name)), "c")
    graph = onnx.helper.make_graph(nodes, name, [info("mask", 1, [2]), info(entering, 1, [2])],
                                   [info(leaving, 1, [2])], [constant])  # fmt: skip
    return ir.from_proto(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)]))


def test_parts_are_joined_in_order(tmp_path: Path):
    parts = [(name, step(name, "entering", "leaving")) for name in ("a", "bb", "ccc")]
    onnx_graph.write_model(tmp_path / "model.onnx", onnx_graph.joined(parts))
    onnx.checker.check_model(tmp_path / "model.onnx", full_check=True)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    mask, x = np.array([1, 2], np.float32), np.array([5, 7], np.float32)
    assert [value.name for value in session.get_outputs()] == ["logits"]
    (found,) = session.run(None, {"mask": mask, "entering": x})
    assert np.array_equal(found, (((x + 1) * mask + 2) * mask + 3) * mask)
