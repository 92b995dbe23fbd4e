"""From options to formats."""

import importlib.util
from typing import get_args

from shardq.config import ExportConfig
from shardq.errors import ConfigError
from shardq.export.aimet import Aimet
from shardq.export.base import Format
from shardq.export.checkpoint import Checkpoint
from shardq.export.compressed_tensors import CompressedTensors
from shardq.export.gguf import Gguf
from shardq.export.gptq import Gptq
from shardq.export.hf import Hf
from shardq.export.onnx import Onnx
from shardq.formats.options import ExportOptions, FormatName

FORMATS: tuple[FormatName, ...] = get_args(FormatName)  # each to a folder of its name; a target's preferred one first


def format_of(name: FormatName, options: ExportOptions | ExportConfig) -> Format:
    """The format of a name, with the options that belong to it."""
    match name:
        case "compressed-tensors":
            return CompressedTensors(options.activation_bits)
        case "gptq":
            return Gptq()
        case "hf":
            return Hf(options.dtype)
        case "onnx":
            return Onnx()
        case "gguf":
            return Gguf()
        case "aimet":
            return Aimet(options.aimet.version)


def formats_of(options: ExportOptions) -> dict[FormatName, Format]:
    """The further formats that a run is asked for, by name."""
    return {name: format_of(name, options) for name in options.asked}


def own_form(options: ExportOptions) -> Checkpoint:
    """The form of the checkpoint that a run's folder itself is."""
    return CompressedTensors(options.activation_bits) if options.checkpoint == "packed" else Hf(options.dtype)


def served_as(target: str, options: ExportOptions) -> Format:
    """The format that a target's program reads: its preferred one, unless the options name another that it reads."""
    return next(chosen for name in FORMATS if (chosen := format_of(name, options)).rounded_by == target)


def checkpoints_of(options: ExportOptions) -> dict[FormatName, Checkpoint]:
    """The further formats that have a shard for each block, which is written during the run."""
    return {name: chosen for name, chosen in formats_of(options).items() if isinstance(chosen, Checkpoint)}


def check_options(config: ExportConfig) -> None:
    """Check that a format is asked for nothing that belongs to another.

    Raises:
        ConfigError: naming the option, its value and the format that has it.
    """
    own = format_of(config.format, config).options
    for name in FORMATS:
        defaults = format_of(name, ExportOptions()).options
        for option, value in format_of(name, config).options.items():
            if option not in own and value != defaults[option]:
                raise ConfigError(f"{option}: {value} is not allowed, it must be left out but for --format {name}")


def check_installed(chosen: Format) -> None:
    """Check that the package that writes a format is installed.

    Raises:
        ConfigError: the package is missing; says how to install it.
    """
    name, package = chosen.name, chosen.package
    if package and importlib.util.find_spec(package) is None:
        raise ConfigError(f"format {name}: the package {package} is missing; pip install 'shardq[{name}]'")
