"""AIMET encodings without weights; `hf` has the weights that belong to them."""

from dataclasses import dataclass
from pathlib import Path

from shardq.export.base import Format, Grids
from shardq.formats import encodings
from shardq.formats.block_file import read_activations, read_block
from shardq.formats.integers import integer_grid
from shardq.logs import Display
from shardq.model.skeleton import Skeleton
from shardq.quant.grid import Grid
from shardq.rundir.encodings import merge_encodings
from shardq.rundir.folder import RunFolder

USE_ENCODINGS = """AIMET encodings of the weights, by torch names, lists in [out, in] order: all in `model.encodings`
or, version 0.6.1, in `model_torch.encodings`, and block by block in `encodings/`. The weights that belong to them are
those of `shardq export RUN --format hf`, each on its grid already. aimet_torch loads version 0.6.1:"""
LOAD_ENCODINGS = 'sim.load_encodings("path/to/this/folder/model_torch.encodings")  # of a QuantizationSimModel'


@dataclass(frozen=True)
class Aimet(Format):
    """Encodings of one version, of each block and of the model."""

    name = "aimet"
    holds_weights = False
    version: encodings.Version

    @property
    def options(self) -> dict[str, object]:
        return {"aimet.version": self.version}

    def check(self, skeleton: Skeleton, grids: Grids) -> None:
        num_scales = 0
        for name, grid in grids.items():
            num_outputs, num_inputs = skeleton.tensor(f"{name}.weight").shape
            num_scales += integer_grid(self.name, grid).num_scales(num_outputs, num_inputs)
        encodings.check_size(self.version, num_scales)

    def matrix_bytes(self, shape: tuple[int, ...], grid: Grid, itemsize: int) -> int:
        files = 2  # the block's own, and its part of the model's
        return files * encodings.BYTES_A_SCALE[self.version] * grid.num_scales(*shape)

    def write(self, skeleton: Skeleton, grids: Grids, folder: Path, display: Display, is_begun: bool) -> float:
        run, num_blocks = skeleton.folder, len(skeleton.names)
        for number in range(num_blocks):
            path, block = RunFolder(folder).encodings(self.version, number), RunFolder(run).block(number)
            encodings.write(path, self.version, read_block(block), read_activations(block))
        merge_encodings(folder, self.version, run, num_blocks)
        return 0.0

    def how_to_serve(self, grids: Grids, factory: str) -> str:
        return f"{USE_ENCODINGS}\n\n```python\n{LOAD_ENCODINGS}\n```"
