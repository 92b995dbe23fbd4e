"""The peers that shardq is compared with, by the options that name their environments."""

from dataclasses import dataclass
from pathlib import Path

WORKERS = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Peer:
    """A peer, and the program that runs it in its environment.

    Attributes:
        package: what the environment must have.
        worker: the program.
        options: what the program takes beside every worker's options; by its name for each, the name of ours.
    """

    package: str
    worker: Path
    options: dict[str, str]


PEERS = {
    "aimet": Peer("aimet-torch", WORKERS / "aimet_adascale.py", {"--iterations": "iterations"}),
    "autoround": Peer(
        "auto-round",
        WORKERS / "autoround_tuning.py",
        {"--iterations": "iterations", "--dtype": "autoround_dtype"},
    ),
    "llmcompressor": Peer("llmcompressor", WORKERS / "llmcompressor_gptq.py", {}),
}
