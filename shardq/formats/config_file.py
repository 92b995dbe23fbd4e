"""A checkpoint's config.json, and the scheme by which it says that weights are stored."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shardq.errors import CheckpointError
from shardq.files import storage_errors
from shardq.formats.shards import inside

SCHEME = "quantization_config"
SCHEMES = (SCHEME, "compression_config")  # the second is what compressed-tensors once wrote


def read_config(folder: Path) -> dict:
    """A checkpoint's config.json.

    Raises:
        CheckpointError: it is missing or no JSON object.
    """
    path = inside(folder, "config.json")
    if not path.is_file():
        raise CheckpointError(f"{path}: missing; --model takes a Hugging Face checkpoint folder")
    try:
        with storage_errors(path, "read"):
            config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise TypeError(f"a {type(config).__name__}")
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: not a JSON object ({error}); download it again") from error
    return config


def scheme_of(config: dict) -> Any:
    """How a config, or a part of it such as the text model's, says that weights are stored; None: it does not."""
    return next(_schemes(config), None)


def without_scheme(config: dict) -> dict:
    """The config for plain weights: without the schemes of itself and of its parts."""
    return {
        name: without_scheme(value) if _is_part(name, value) else value
        for name, value in config.items()
        if name not in SCHEMES
    }


def _schemes(config: dict) -> Iterator[Any]:
    yield from (config[name] for name in SCHEMES if config.get(name))
    for name, value in config.items():
        if name not in SCHEMES and _is_part(name, value):
            yield from _schemes(value)


def _is_part(name: str, value: object) -> bool:
    return name.endswith("_config") and isinstance(value, dict)
