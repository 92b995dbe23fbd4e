"""The manifest of a run: everything that decides its result, which distinguishes it from other runs."""

import hashlib
import json
import re
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

from shardq import __version__
from shardq.config import QuantizeConfig, QuantOptions, listed
from shardq.files import sha256_of
from shardq.formats.options import ExportOptions
from shardq.formats.shards import read_sample
from shardq.formats.source import WeightSource

# Entries of config.json that decide no number here: who wrote it, and dtypes, as weights are computed in our own.
IRRELEVANT = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache")
# May differ when a run goes on.
NOT_PART_OF_A_RUN = ("model", "revision", "output", "resume", "redo", "self_check", "device", "tensor_parallel",
                     "cache", "checkpoint", "parallel")  # fmt: skip
# Options in which blocks that are done again may differ from those before them.
REDO_MAY_CHANGE = ("seed", "optimize.", "calib.", "calibration_tokens", "quant.method")


def make_manifest(config: QuantizeConfig, source: WeightSource, tokens_digest: str) -> dict:
    """Everything that decides a run's result, except the last bits, which depend on ranks and engine."""
    options = {name: value for name, value in asdict(config).items() if name not in NOT_PART_OF_A_RUN}
    name = _hub_name(config.model)
    del options["optimize"]["memory_gib"]  # decides the micro-batch, nothing else
    del options["export"]["formats"], options["export"]["aimet"]  # may be written at any time
    # As in runs from before these had other defaults.
    options["quant"]["group_size"] = config.quant.grid.group_size
    if options["export"]["checkpoint"] == "plain":
        del options["export"]["checkpoint"]
    if not config.activations.asked:
        del options["activations"]  # the others decide nothing then
    manifest = {
        "shardq": __version__,
        "model": model_of(source) | ({"name": name} if name else {}),
        "calibration_tokens": tokens_digest,
        "options": options,
    }
    return json.loads(json.dumps(manifest))  # as it will be read back: tuples are lists


def _hub_name(model: str) -> str | None:
    """The name of a model of the hub, also where its folder in the cache is given; None for another folder."""
    if not Path(model).is_dir():
        return model
    found = re.search(r"/models--([^/]+?)--([^/]+)/snapshots/[^/]+$", str(Path(model).absolute()))
    return f"{found[1]}/{found[2]}" if found else None


def quant_options(section: dict) -> QuantOptions:
    """The weights' quantization of a run, from that section of its manifest's options."""
    return QuantOptions(**section | {"group_size": section.get("group_size") or -1})


def export_options(manifest: dict) -> ExportOptions:
    """What the run that a manifest is of writes, without its further formats."""
    return ExportOptions(**{"checkpoint": "plain"} | manifest["options"]["export"])


def model_of(source: WeightSource) -> dict:
    """Digests that identify a model before its weights are read.

    `config` is the digest of config.json, for the record; `settings`, that of its content, is compared. `weights`, and
    `files` for each file, cover every stored tensor's name, place, shape, dtype and 4 KiB from its middle.

    Hashing all bytes of a 70B model would take minutes whenever a run starts; a retrained or another model differs in
    these too. Differences in other bytes are found when they are read, by the digests in the ledger.
    """
    path = source.folder / "config.json"
    weights = hashlib.sha256()
    files: dict[str, Any] = defaultdict(hashlib.sha256)
    for info in source.index.values():
        place = repr((info.name, info.file.name, info.dtype, info.shape, info.offset)).encode()
        for part in (place, read_sample(info)):
            weights.update(part)
            files[info.file.name].update(part)
    by_file = {name: digest.hexdigest() for name, digest in files.items()}
    return {"config": sha256_of(path), "settings": _settings(path), "weights": weights.hexdigest(), "files": by_file}


def _settings(path: Path) -> str:
    """Digest of a config.json that formatting, the order of entries and irrelevant ones do not change."""

    def number(text: str) -> float:
        value = float(text)
        return int(value) if value.is_integer() else value  # some programs write 10000.0 as 10000

    def entries(pairs: list[tuple[str, object]]) -> dict:
        return {name: value for name, value in pairs if name not in IRRELEVANT}

    content = json.loads(path.read_text(encoding="utf-8"), parse_float=number, object_pairs_hook=entries)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def differences(former: dict, current: dict) -> dict[str, str]:
    """Differences between two manifests that matter: both values, as text, by dotted name.

    If the tokens are equal, their text does not matter; if the settings are equal, the bytes of config.json do not. For
    a run that was begun before there were settings, the file must be equal.
    """
    found = _differences(former, current)
    same_tokens, same_settings = "calibration_tokens" not in found, "model.settings" not in found
    files = [name.removeprefix("model.files.") for name in found if name.startswith("model.files.")]
    if files:
        more = f" and {len(files) - 1} more" if len(files) > 1 else ""
        found["model.weights"] = f"model.weights (in {files[0]}{more})"
    if same_settings:
        found.pop("model.config", None)
    # `model.config` and `model.weights` represent the other entries about the model.
    told = ("model.settings", "model.files", "model.name", *(["calib."] if same_tokens else []))
    return {name: text for name, text in found.items() if not name.startswith(told)}


def _differences(former: object, current: object, path: str = "") -> dict[str, str]:
    if isinstance(former, dict) and isinstance(current, dict):
        found: dict[str, str] = {}
        for name in sorted(former.keys() | current.keys()):
            found |= _differences(former.get(name), current.get(name), f"{path}.{name}" if path else name)
        return found
    name = path.removeprefix("options.")
    if name == "quant.ignore" and isinstance(former, str):
        former = list(listed(former))  # a run that was begun when text was kept as it was typed
    if name == "export.checkpoint":
        former, current = former or "plain", current or "plain"
    return {} if former == current else {name: f"{name} (was {_short(former)}, is {_short(current)})"}


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:12] + "..."
