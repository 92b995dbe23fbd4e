"""Graphs with packed codes, for onnxruntime."""

import math
from pathlib import Path

import torch

from shardq.export.base import Format, Grids
from shardq.formats.checkpoint import write_config
from shardq.formats.integers import integer_grid
from shardq.logs import Display
from shardq.model.skeleton import Skeleton
from shardq.quant.grid import Grid

LOAD_ONNX = """session = onnxruntime.InferenceSession("path/to/this/folder/model.onnx")
(logits,) = session.run(None, {"input_ids": ids, "attention_mask": np.ones_like(ids)})  # int64 [N, T]"""

ONNX_PARTS = """`embedding.onnx`, `block-NNNNN.onnx` and `head.onnx` are the same model in parts, each of which takes
`attention_mask` beside `input_ids` or `hidden_states`. By default onnxruntime rounds activations to int8 where it
multiplies by packed weights; the session option `session.qdq_matmulnbits_accuracy_level`, set to `1`, keeps them in
float32."""


class Onnx(Format):
    """The model in one graph, and in parts, over the same files of weights; scales stay in float32."""

    name = "onnx"
    package = "onnxscript"
    is_of_text = True

    def check(self, skeleton: Skeleton, grids: Grids) -> None:
        for grid in set(grids.values()):
            integer_grid(self.name, grid)

    def matrix_bytes(self, shape: tuple[int, ...], grid: Grid, itemsize: int) -> int:
        return math.prod(shape) // (1 if grid.bits > 4 else 2) + 5 * grid.num_scales(*shape)

    def write(self, skeleton: Skeleton, grids: Grids, folder: Path, display: Display, is_begun: bool) -> float:
        from shardq.export.onnx_graphs import write_onnx  # its packages are an extra

        write_onnx(skeleton, folder, grids, display)
        write_config(skeleton.folder, folder, torch.float32)
        return 0.0

    def how_to_serve(self, grids: Grids, factory: str) -> str:
        return f"With onnxruntime; no cache of keys and values:\n\n```python\n{LOAD_ONNX}\n```\n\n{ONNX_PARTS}"
