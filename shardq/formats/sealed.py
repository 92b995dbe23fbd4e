"""JSON objects that carry a digest of themselves: a changed letter shows, whatever it says."""

import json

import xxhash

SEAL = "seal"


def sealed(value: dict) -> dict:
    """An object with its seal: XXH3 of 64 bits of the rest, as JSON with sorted keys."""
    return value | {SEAL: _digest(value)}


def unsealed(value: dict) -> dict:
    """An object without its seal; one that has none is given as it is.

    Raises:
        ValueError: the seal is not that of the rest.
    """
    rest = {name: part for name, part in value.items() if name != SEAL}
    if SEAL in value and value[SEAL] != _digest(rest):
        raise ValueError("its seal is not that of the rest")
    return rest


def _digest(value: dict) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(value, sort_keys=True).encode())
