"""Where a run's files are: in an output folder that all hosts share, and in caches that may be each host's own."""

import hashlib
from pathlib import Path

from shardq.config import QuantizeConfig, TuneConfig
from shardq.files import sha256_of
from shardq.parallel.ranks import Ranks
from shardq.rundir.ledger import MANIFEST


def output_folder(config: QuantizeConfig) -> Path:
    """The folder that is asked for, or one named after model and grid."""
    spec = config.quant.spec
    group = f"-g{spec.group_size}" if spec.group_size else ""
    return Path(config.output or f"runs/{Path(config.model).resolve().name}-w{spec.bits}{group}")


def cache_folder(config: QuantizeConfig | TuneConfig, output: Path, num_redos: int = 0) -> Path:
    """Folder of this run's cached activations, and of nothing else.

    Outside the output folder its name depends on that, on what the run is and how often blocks of it were done again:
    files that another run, or former blocks, have left on a host's disk are never taken for this one's.
    """
    if config.cache.folder is None:
        return output / "cache"
    identity = f"{output.resolve()} {sha256_of(output / MANIFEST)} {num_redos}"
    return Path(config.cache.folder) / f"shardq-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"


def events_file(output: Path, ranks: Ranks) -> Path:
    """The log of times: one a host, as a network disk does not keep appended lines of several hosts apart."""
    host = f"-rank-{ranks.first_on_host}" if ranks.first_on_host else ""
    return output / f"events{host}.jsonl"
