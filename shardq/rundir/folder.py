"""The paths of a run's files."""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

from shardq.cache.options import CacheOptions
from shardq.config import QuantizeConfig
from shardq.files import sha256_of
from shardq.formats.encodings import Version
from shardq.formats.shards import INDEX_FILE
from shardq.parallel.ranks import Ranks

MANIFEST = "manifest.json"
MODEL_CARD = "README.md"  # of a run's folder and of an export's
LOCK = "lock"  # lock file of a run's folder and of an export's


def output_folder(config: QuantizeConfig) -> Path:
    """The folder that is asked for, or one named after the model and what is asked for of its grid."""
    quant = config.quant if config.quant.group_size else replace(config.quant, group_size=-1)
    return Path(config.output or f"runs/{Path(config.model).resolve().name}-{quant.grid.name}")


@dataclass(frozen=True)
class RunFolder:
    """The paths of a run, in a folder that all hosts share; its cache may be each host's own."""

    path: Path

    @property
    def manifest(self) -> Path:
        """The manifest: what the run is."""
        return self.path / MANIFEST

    @property
    def ledger(self) -> Path:
        """The ledger: what the run has finished."""
        return self.path / "ledger.jsonl"

    @property
    def is_taken(self) -> bool:
        """Whether a run has begun here."""
        return self.manifest.exists() or self.ledger.exists()

    @property
    def stop(self) -> Path:
        """The file that asks the run to end after the present block."""
        return self.path / "stop"

    @property
    def checkpoint(self) -> Path:
        """Folder of the training checkpoints of a block."""
        return self.path / "checkpoint"

    @property
    def tuning_state(self) -> Path:
        """The saved state of tuning a run's scales."""
        return self.path / "tuning.safetensors"

    @property
    def config(self) -> Path:
        """The configuration of the quantized model."""
        return self.path / "config.json"

    @property
    def index(self) -> Path:
        """The index of the quantized model's checkpoint."""
        return self.path / INDEX_FILE

    @property
    def logs(self) -> list[Path]:
        """The logs of times of all hosts."""
        return sorted(self.path.glob("events*.jsonl"))

    def log(self, ranks: Ranks) -> Path:
        """The log of times: one a host, as a network disk does not keep appended lines of several hosts apart."""
        host = f"-rank-{ranks.first_on_host}" if ranks.first_on_host else ""
        return self.path / f"events{host}.jsonl"

    def block(self, block_index: int) -> Path:
        """Codes, scales and zero points of a block."""
        return self.path / "blocks" / f"block-{block_index:05d}.safetensors"

    def encodings(self, version: Version, block_index: int | None = None) -> Path:
        """AIMET encodings of a block, or of the whole model; those of 0.6.1 have the name that aimet_torch gives them.

        An export's folder has them at the same places.
        """
        suffix = "_torch" if version == "0.6.1" else ""
        if block_index is None:
            return self.path / f"model{suffix}.encodings"
        return self.path / "encodings" / f"block-{block_index:05d}{suffix}.json"

    def cache(self, options: CacheOptions, num_redos: int = 0) -> Path:
        """Folder of this run's cached activations, and of nothing else.

        Outside the output folder its name depends on that folder, on the manifest and on the number of redos, so that
        files that another run, or earlier blocks, have left on a host's disk are never taken for this run's.
        """
        if options.folder is None:
            return self.path / "cache"
        identity = f"{self.path.resolve()} {sha256_of(self.manifest)} {num_redos}"
        return Path(options.folder) / f"shardq-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
