"""AIMET encodings of a model, merged from those of its blocks."""

from pathlib import Path

from shardq.formats import encodings
from shardq.formats.block_file import read_activations
from shardq.quant.activation import ActivationGrid
from shardq.rundir.folder import RunFolder


def merge_encodings(folder: Path, version: encodings.Version, run: Path, num_blocks: int) -> Path:
    """Merge the blocks' encodings into the model's, and return their file."""
    path = RunFolder(folder).encodings(version)
    parts = (RunFolder(folder).encodings(version, number) for number in range(num_blocks))
    encodings.merge(path, version, parts, all_activations(run, num_blocks))
    return path


def all_activations(output: Path, num_blocks: int) -> dict[str, ActivationGrid]:
    """The grids of all blocks' activations, by full name."""
    files = (RunFolder(output).block(number) for number in range(num_blocks))
    return {name: grid for path in files for name, grid in read_activations(path).items()}
