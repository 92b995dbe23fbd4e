"""AIMET encodings of a finished run, from the codes, scales and activations' grids of its blocks."""

import math
from pathlib import Path

from shardq.formats import encodings
from shardq.formats.block_file import read_activations, read_block
from shardq.formats.shards import read_header
from shardq.quant.activation import ActivationGrid
from shardq.rundir.folder import RunFolder


def write_encodings(run: Path, num_blocks: int, folder: Path, version: encodings.Version) -> None:
    """Write the encodings of each block and of the model.

    Raises:
        ConfigError: the version makes too large a file of the run's scales.
    """
    paths = [RunFolder(run).block(number) for number in range(num_blocks)]
    num_scales = sum(
        math.prod(info.shape) for path in paths for name, info in read_header(path).items() if name.endswith(".scale")
    )
    encodings.check_size(version, num_scales)
    for number, path in enumerate(paths):
        encodings.write(RunFolder(folder).encodings(version, number), version, read_block(path), read_activations(path))
    merge_encodings(folder, version, run, num_blocks)


def merge_encodings(folder: Path, version: encodings.Version, run: Path, num_blocks: int) -> Path:
    """Write the model's encodings from those of its blocks, and give their file."""
    path = RunFolder(folder).encodings(version)
    parts = (RunFolder(folder).encodings(version, number) for number in range(num_blocks))
    encodings.merge(path, version, parts, all_activations(run, num_blocks))
    return path


def all_activations(output: Path, num_blocks: int) -> dict[str, ActivationGrid]:
    """The grids of all blocks' activations, by full name."""
    files = (RunFolder(output).block(number) for number in range(num_blocks))
    return {name: grid for path in files for name, grid in read_activations(path).items()}
