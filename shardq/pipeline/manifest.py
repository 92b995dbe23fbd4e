"""What a run is, told apart from other runs: all that decides its result."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

from shardq import __version__
from shardq.config import QuantizeConfig
from shardq.files import sha256_of
from shardq.formats.shards import Index, read_sample

# May differ when a run goes on.
NOT_PART_OF_A_RUN = ("model", "revision", "output", "resume", "redo", "device", "tensor_parallel", "cache",
                     "checkpoint", "parallel")  # fmt: skip
# What blocks that are done again may differ in from those before them.
REDO_MAY_CHANGE = ("seed", "optimize.", "calib.", "calibration_tokens", "quant.method")


def make_manifest(config: QuantizeConfig, index: Index, folder: Path, tokens_digest: str) -> dict:
    """Everything that decides a run's result, but for the last bits that depend on ranks and engine."""
    options = {name: value for name, value in asdict(config).items() if name not in NOT_PART_OF_A_RUN}
    del options["optimize"]["memory_gib"]  # decides the micro-batch, nothing else
    del options["export"]["formats"], options["export"]["aimet"]  # may be written at any time
    if not config.activations.asked:
        del options["activations"]  # the others decide nothing then
    manifest = {
        "shardq": __version__,
        "model": model_of(index, folder),
        "calibration_tokens": tokens_digest,
        "options": options,
    }
    return json.loads(json.dumps(manifest))  # as it will be read back: tuples are lists


def model_of(index: Index, folder: Path) -> dict:
    """What tells the model in a folder apart from others."""
    return {"config": sha256_of(folder / "config.json"), "weights": _fingerprint(index)}


def _fingerprint(index: Index) -> str:
    """Digest over every tensor's name, place, shape, dtype and 4 KiB from its middle.

    Hashing all bytes of a 70B model would take minutes at every start; a retrained or another model differs here too.
    """
    digest = hashlib.sha256()
    for info in index.values():
        digest.update(repr((info.name, info.file.name, info.dtype, info.shape, info.offset)).encode())
        digest.update(read_sample(info))
    return digest.hexdigest()


def differences(stored: object, current: object, path: str = "") -> dict[str, str]:
    """What differs between two manifests: both values by dotted name."""
    if isinstance(stored, dict) and isinstance(current, dict):
        found: dict[str, str] = {}
        for name in sorted(stored.keys() | current.keys()):
            found |= differences(stored.get(name), current.get(name), f"{path}.{name}" if path else name)
        return found
    name = path.removeprefix("options.")
    return {} if stored == current else {name: f"{name} (was {_short(stored)}, is {_short(current)})"}


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:12] + "..."
