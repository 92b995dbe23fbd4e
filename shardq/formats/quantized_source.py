"""Checkpoints however they are stored, plain or quantized by this tool or another, opened as the weights they hold."""

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from shardq.errors import CheckpointError
from shardq.formats import awq, compressed_tensors, fp8, gptq, modelopt, mxfp4
from shardq.formats.config_file import read_config, scheme_of
from shardq.formats.shards import Index
from shardq.formats.source import Decoder, SourceTensor, WeightSource, only_plain, open_source

DECODERS: dict[str, Decoder] = {  # by `quant_method`
    "awq": awq.encoded_tensors,
    "compressed-tensors": compressed_tensors.encoded_tensors,
    "fbgemm_fp8": fp8.encoded_tensors,
    "fp8": fp8.encoded_tensors,
    "gptq": gptq.encoded_tensors,
    "modelopt": modelopt.encoded_tensors,
    "mxfp4": mxfp4.encoded_tensors,
}


def open_checkpoint(folder: Path) -> WeightSource:
    """Open a checkpoint folder, plain or stored by a scheme of `DECODERS`.

    Raises:
        CheckpointError: as `open_source` and the decoders; no tensor is encoded although config.json says so.
        UnsupportedModelError: config.json names another scheme, or a kind that the decoders refuse.
    """
    return open_source(folder, partial(_encoded_tensors, folder))


def _encoded_tensors(folder: Path, index: Index, scheme: Any) -> Iterable[SourceTensor]:
    method = scheme.get("quant_method") if isinstance(scheme, dict) else None
    if not isinstance(method, str) or method not in DECODERS:
        return only_plain(folder, index, scheme)
    encoded = list(DECODERS[method](index, scheme))
    if not encoded:
        raise CheckpointError(f"{folder}: no tensor is quantized although config.json says {method}; download it again")
    return encoded


def rounds_activations(folder: Path) -> bool:
    """Whether programs that serve a folder which `open_checkpoint` takes round what enters its linears."""
    scheme = scheme_of(read_config(folder)) or {}
    if scheme.get("quant_method") == "compressed-tensors":
        return any(group.get("input_activations") for group in scheme["config_groups"].values())
    return scheme.get("quant_method") == "modelopt" or bool(scheme.get("activation_scheme"))
