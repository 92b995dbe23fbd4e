"""ONNX: packed codes that DequantizeLinear turns into weights, and the parts of a model in one graph.

A quantized linear's weight becomes `<linear>.codes` [I, O], INT4 up to 4 bits and INT8 above, INT2 at 2 bits;
`<linear>.scale` float32, [O] per-channel or [G, O] in groups, and, on an asymmetric grid, `<linear>.zero_point` of the
codes' type. Input channels come first because onnxruntime then multiplies by the packed codes (its MatMulNBits).
https://onnx.ai/onnx/operators/onnx__DequantizeLinear.html; a weight's bytes lie in a file of external data.
"""

from collections.abc import Iterable
from pathlib import Path

import ml_dtypes
import onnx_ir as ir
from torch import Tensor

from shardq.files import write_whole
from shardq.formats.integers import integer_grid
from shardq.quant.grid import Grid
from shardq.quant.quantized import QuantizedLinear

PAGE = 4096  # external data is mapped into memory where its offset is a multiple


def opset_for(grid: Grid) -> int:
    """The first opset that has a grid's types: 21 brought INT4 and scales in groups, 25 brought INT2."""
    return 25 if grid.bits == 2 else 21


def plain_tensor(name: str, tensor: Tensor) -> ir.TensorProtocol:
    """A weight in its own dtype."""
    return ir.tensor(tensor, name=name)


def linear_tensors(name: str, linear: QuantizedLinear) -> list[ir.TensorProtocol]:
    """Codes, scales and zero points of a linear, in the smallest type that holds them."""
    bits, grouped = integer_grid("onnx", linear.grid).bits, linear.grid.group_size is not None
    dtype = {2: ml_dtypes.int2, 3: ml_dtypes.int4, 4: ml_dtypes.int4}.get(bits, "int8")

    def values(kind: str, values_OG: Tensor, dtype: object) -> ir.TensorProtocol:
        ordered = values_OG.T.contiguous() if grouped else values_OG[:, 0]
        return ir.Tensor(ordered.numpy().astype(dtype), name=f"{name}.{kind}")

    codes = ir.Tensor(linear.codes_OI.T.contiguous().numpy().astype(dtype), name=f"{name}.codes")
    tensors = [codes, values("scale", linear.scale_OG, "float32")]
    return [*tensors, values("zero_point", linear.zero_point_OG, dtype)] if linear.grid.has_zero_point else tensors


def write_data(path: Path, tensors: Iterable[ir.TensorProtocol]) -> dict[str, ir.ExternalTensor]:
    """Write tensors, one in memory at a time, to a file that appears whole; give where each lies, by name."""
    placed = {}

    def write(aside: Path) -> None:
        with open(aside, "wb") as file:
            for tensor in tensors:
                file.write(bytes(-file.tell() % PAGE))
                offset = file.tell()
                length = file.write(tensor.tobytes())
                placed[tensor.name] = ir.ExternalTensor(
                    path.name, offset, length, tensor.dtype, shape=tensor.shape, name=tensor.name, base_dir=path.parent
                )

    write_whole(path, write)
    return placed


def write_model(path: Path, model: ir.Model) -> None:
    """Write a graph, whose weights lie in files beside it, to a file that appears whole."""
    data = ir.to_proto(model).SerializeToString(deterministic=True)
    write_whole(path, lambda aside: aside.write_bytes(data))


def place_weights(graph: ir.Graph, placed: dict[str, ir.ExternalTensor], grids: dict[str, Grid]) -> None:
    """Give a graph's initializers without value their weights.

    Args:
        placed: a plain weight by the initializer's name, a quantized one's parts as `linear_tensors` names them.
        grids: by name of the linear.
    """
    for value in [value for value in graph.initializers.values() if value.const_value is None]:
        name = value.name
        linear = name.removesuffix(".weight")
        if linear in grids:
            _dequantize(graph, value, placed, linear, grids[linear])
        elif placed[name].dtype == ir.DataType.FLOAT:
            value.const_value = placed[name]
        else:
            del graph.initializers[name]
            stored = _initializer(graph, placed[name], f"{name}.stored")
            cast = ir.node("Cast", [stored], {"to": ir.DataType.FLOAT}, name=f"{name}.cast")
            cast.outputs[0].name = name
            graph.insert_before(graph[0], cast)
            ir.convenience.replace_all_uses_with(value, cast.outputs[0])


def _initializer(graph: ir.Graph, tensor: ir.ExternalTensor, name: str) -> ir.Value:
    value = ir.Value(name=name, const_value=tensor, shape=tensor.shape, type=ir.TensorType(tensor.dtype))
    graph.register_initializer(value)
    return value


def _dequantize(
    graph: ir.Graph, value: ir.Value, placed: dict[str, ir.ExternalTensor], linear: str, grid: Grid
) -> None:
    """Put a linear's codes and a DequantizeLinear in its weight's place."""
    del graph.initializers[value.name]
    parts = [f"{linear}.{kind}" for kind in ("codes", "scale", "zero_point") if f"{linear}.{kind}" in placed]
    along = {"axis": 0, "block_size": grid.group_size} if grid.group_size else {"axis": 1}
    inputs = [_initializer(graph, placed[part], part) for part in parts]
    node = ir.node("DequantizeLinear", inputs, along, name=f"{linear}.dequantize")
    weight_IO = node.outputs[0]
    weight_IO.name = f"{linear}.weight_transposed"
    graph.insert_before(graph[0], node)
    for use in list(value.uses()):
        if use.node.op_type == "Transpose":  # the exporter's own, of the weight that torch keeps as [O, I]
            ir.convenience.replace_all_uses_with(use.node.outputs[0], weight_IO)
            graph.remove(use.node, safe=True)
    if value.uses():
        back = ir.node("Transpose", [weight_IO], {"perm": [1, 0]}, name=f"{linear}.transpose")
        back.outputs[0].name = f"{linear}.weight"
        graph.insert_after(node, back)
        ir.convenience.replace_all_uses_with(value, back.outputs[0])


def joined(parts: Iterable[tuple[str, ir.Model]]) -> ir.Model:
    """One model of parts by name, each of which takes the mask and what the part before it gives; consumes them."""
    whole = None
    for name, model in parts:
        graph = model.graph
        inputs = {value.name for value in graph.inputs}
        values = [*graph.initializers.values(), *(output for node in graph for output in node.outputs)]
        for value in values:
            if not isinstance(value.const_value, ir.ExternalTensor) and value.name not in inputs:
                value.name = f"{name}/{value.name}"
        for node in graph:
            node.name = f"{name}/{node.name}"
        if whole is None:
            whole = model
            continue
        mask, entering = graph.inputs
        ir.convenience.replace_all_uses_with(mask, whole.graph.inputs[0])
        ir.convenience.replace_all_uses_with(entering, whole.graph.outputs[0])
        leaving = graph.outputs[0]
        graph.outputs.clear()
        for value in list(graph.initializers.values()):
            del graph.initializers[value.name]
            whole.graph.register_initializer(value)
        nodes = list(graph)
        graph.remove(nodes)
        whole.graph.extend(nodes)
        whole.graph.outputs[0] = leaving
    whole.graph.outputs[0].name = "logits"
    return whole
