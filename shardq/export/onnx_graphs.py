"""A finished run as ONNX: the whole model in one graph, and each part in a graph of its own, over the same weights."""

from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir

from shardq.formats import onnx_graph
from shardq.formats.block_file import read_block
from shardq.logs import Display
from shardq.model.graph import traced_parts
from shardq.model.skeleton import Skeleton
from shardq.quant.grid import Grid
from shardq.rundir.folder import RunFolder


def write_onnx(skeleton: Skeleton, folder: Path, grids: dict[str, Grid], display: Display) -> None:
    """Write `model.onnx`, the same in parts, and a file of weights for each block and one for what is outside them.

    The parts are `embedding.onnx`, `block-NNNNN.onnx` and `head.onnx`. One block's weights are in memory at a time.

    Args:
        grids: by full name of the linear.

    Raises:
        UnsupportedModelError: torch's ONNX exporter cannot take the model.
    """
    opset = max(map(onnx_graph.opset_for, grids.values()))
    ends = _write_ends(skeleton, folder)

    def parts() -> Iterator[tuple[str, ir.Model]]:
        for name, block_index, model in traced_parts(skeleton, opset):
            if block_index is not None:
                display.start_part("onnx: block", block_index, len(skeleton.names))
            placed = ends
            if block_index is not None:
                placed = onnx_graph.write_data(folder / f"{name}.data", _block_weights(skeleton, block_index))
            onnx_graph.place_weights(model.graph, placed, grids)
            onnx_graph.write_model(folder / f"{name}.onnx", model)
            yield name, model

    with display.bars(1, 0, "model", "blocks"):
        onnx_graph.write_model(folder / "model.onnx", onnx_graph.joined(parts()))


def _write_ends(skeleton: Skeleton, folder: Path) -> dict[str, ir.ExternalTensor]:
    """Weights outside the blocks, tied ones stored once."""
    tensors = {name: skeleton.tensor(name) for name in skeleton.model.state_dict()}
    read = skeleton.source.read_unchecked
    once = (onnx_graph.plain_tensor(tensor.name, read(tensor)) for tensor in dict.fromkeys(tensors.values()))
    placed = onnx_graph.write_data(folder / "ends.data", once)
    return {name: placed[tensor.name] for name, tensor in tensors.items()}


def _block_weights(skeleton: Skeleton, block_index: int) -> Iterator[ir.TensorProtocol]:
    linears = read_block(RunFolder(skeleton.folder).block(block_index))
    for name, tensor in skeleton.block_tensors(block_index).items():
        full_name = f"{skeleton.names[block_index]}.{name}"
        linear = full_name.removesuffix(".weight")
        if linear in linears and name.endswith(".weight"):
            yield from onnx_graph.linear_tensors(linear, linears.pop(linear))
        else:
            yield onnx_graph.plain_tensor(full_name, skeleton.source.read_unchecked(tensor))
