"""One GGUF file, for llama.cpp."""

import math
from pathlib import Path

import torch

from shardq.export.base import Format, Grids
from shardq.logs import Display
from shardq.model.skeleton import Skeleton
from shardq.quant.grid import Grid

LOAD_GGUF = '{factory}.from_pretrained("path/to/this/folder", gguf_file="model.gguf")'


class Gguf(Format):
    """Blocks of 32 codes, each with its scale in float16."""

    name = "gguf"
    package = "gguf"
    rounded_by = "gguf"
    is_of_text = True

    def check(self, skeleton: Skeleton, grids: Grids) -> None:
        from shardq.export.gguf_file import check_gguf  # its package is an extra

        check_gguf(skeleton, grids)

    def scale_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float16

    def matrix_bytes(self, shape: tuple[int, ...], grid: Grid, itemsize: int) -> int:
        return math.prod(shape) * (34 if grid.bits > 4 else 20) // 32

    def write(self, skeleton: Skeleton, grids: Grids, folder: Path, display: Display, is_begun: bool) -> float:
        from shardq.export.gguf_file import write_gguf

        return write_gguf(skeleton, folder, grids)

    def how_to_serve(self, grids: Grids, factory: str) -> str:
        return (
            "```bash\nllama-cli -m path/to/this/folder/model.gguf\n```\n\n"
            f"or in transformers, which unpacks it:\n\n```python\n{LOAD_GGUF.format(factory=factory)}\n```"
        )
