"""Checkpoints that are quantized already, by this tool or another, opened as the weights that programs serve."""

from functools import partial
from pathlib import Path

from shardq.errors import CheckpointError
from shardq.formats import compressed_tensors, gptq
from shardq.formats.shards import open_index
from shardq.formats.source import WeightSource, open_source, read_config


def open_served(folder: Path) -> WeightSource:
    """Open a checkpoint folder, quantized as compressed-tensors or GPTQ store it, or plain.

    Raises:
        CheckpointError: as `open_source` and the decoders; no tensor is encoded although config.json says so.
        UnsupportedModelError: config.json names another scheme, or a kind that the decoders refuse.
    """
    open_index(folder)  # first: a folder of another form is named by the files that it has
    scheme = read_config(folder).get("quantization_config")
    method = scheme.get("quant_method") if isinstance(scheme, dict) else None
    if not isinstance(scheme, dict) or method not in ("compressed-tensors", "gptq"):
        return open_source(folder)
    find = compressed_tensors.encoded_tensors if method == "compressed-tensors" else gptq.encoded_tensors
    source = open_source(folder, partial(find, scheme=scheme))
    if not any(tensor.decode for tensor in source.tensors.values()):
        raise CheckpointError(f"{folder}: no tensor is quantized although config.json says {method}; download it again")
    return source


def rounds_activations(folder: Path) -> bool:
    """Whether programs that serve a folder which `open_served` takes round what enters its linears."""
    scheme = read_config(folder).get("quantization_config") or {}
    return any(group.get("input_activations") for group in (scheme.get("config_groups") or {}).values())
