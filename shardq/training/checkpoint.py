"""Checkpoints of a block's training, from which a killed run goes on within the block.

`OUT/checkpoint/block-00003-try-0-iteration-000150/` holds each rank's part of parameters and moments, in one file if
all ranks hold the same, and the best iterate if there is one. It is used if every rank finds its files undamaged and
made for the same purpose. The previous checkpoint is removed after all ranks have written the new one.
"""

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from shardq.errors import CheckpointError
from shardq.formats.tensor_file import read_checked, write_checked
from shardq.matrix import Matrix
from shardq.optimize.best_iterate import BestIterate
from shardq.parallel.collectives import on_rank_zero, together
from shardq.parallel.engine import Engine
from shardq.quant.grid import Grid
from shardq.quant.quantized import QuantizedLinear
from shardq.rundir.folder import RunFolder

BEST = "best.safetensors"


@dataclass
class Progress:
    """The progress of a block's training.

    Attributes:
        failed: tries that have ended at a number that is not finite.
        done: optimizer steps of the present try.
        best: the best iterate, where one is kept.
    """

    failed: int = 0
    done: int = 0
    best: BestIterate | None = None


@dataclass(frozen=True)
class Checkpoints:
    """The place of a run's checkpoints, and the interval between them.

    Attributes:
        output: the run's folder, which all ranks share.
        every: iterations between two checkpoints; 0: none is written.
        engine: the engine whose training state is saved.
    """

    output: Path
    every: int
    engine: Engine

    @property
    def state_file(self) -> str:
        """Name of the file with this rank's part of the state."""
        return f"state-{self.engine.writer:05d}.safetensors"


def purpose_of(checkpoints: Checkpoints) -> dict:
    """Facts that must be equal when a checkpoint is saved and when it is loaded; the same on all ranks.

    The keys name the facts in the message about a checkpoint that does not fit.
    """
    engine, ranks = checkpoints.engine, checkpoints.engine.ranks

    def beginning() -> str:
        folder = RunFolder(checkpoints.output)
        files = [path for path in (folder.manifest, folder.ledger) if path.exists()]
        return hashlib.sha256(b"\n".join(path.read_bytes() for path in files)).hexdigest()

    return {
        "block, run or finished blocks": on_rank_zero(ranks, beginning),
        "number of ranks": ranks.world_size,
        "engine": engine.made_with(),
        "kind of device": ranks.device.type,
    }


def save(checkpoints: Checkpoints, purpose: dict, block: int, progress: Progress, state: dict[str, Tensor]) -> None:
    """Make the present state the run's checkpoint; all ranks take part.

    Args:
        state: the stepper's.

    Raises:
        StorageError: the disk is full or cannot be written.
    """
    ranks, best = checkpoints.engine.ranks, progress.best
    folder = _folder(checkpoints) / f"block-{block:05d}-try-{progress.failed}-iteration-{progress.done:06d}"
    about = {"purpose": purpose, "failed": progress.failed, "done": progress.done, "has_best": best is not None}

    def write() -> None:
        if checkpoints.engine.writer == ranks.rank:
            write_checked(folder / checkpoints.state_file, state, about)
        if best and ranks.rank == 0:
            facts = {"linears": list(best.linears), "loss": best.loss}
            write_checked(folder / BEST, _tensors_of(best), facts)

    def remove_others() -> None:
        for other in folder.parent.iterdir():
            if other != folder:
                shutil.rmtree(other, ignore_errors=True)

    together(ranks, write)
    on_rank_zero(ranks, remove_others)


def load(
    checkpoints: Checkpoints, purpose: dict, grids: dict[Matrix, Grid], say: Callable[[str], None]
) -> tuple[Progress, dict[str, Tensor]] | None:
    """The newest checkpoint that serves the purpose, and the stepper's state in it; None if there is none.

    Args:
        grids: of the block's matrices.
        say: gets a line about each checkpoint that does not.
    """
    ranks = checkpoints.engine.ranks

    def found() -> list[str]:
        folder = _folder(checkpoints)
        return sorted((path.name for path in folder.iterdir()), reverse=True) if folder.is_dir() else []

    for name in on_rank_zero(ranks, found):
        folder = _folder(checkpoints) / name
        try:
            return together(ranks, lambda folder=folder: _read(folder, checkpoints, purpose, grids))
        except CheckpointError as error:
            where = f" ({error.where})" if error.where else ""
            say(f"{folder}: not used: {str(error).partition(';')[0]}{where}")
    return None


def remove(output: Path) -> None:
    """Remove every checkpoint: the block is committed."""
    shutil.rmtree(RunFolder(output).checkpoint, ignore_errors=True)


def _folder(checkpoints: Checkpoints) -> Path:
    return RunFolder(checkpoints.output).checkpoint


def _read(
    folder: Path, checkpoints: Checkpoints, purpose: dict, grids: dict[Matrix, Grid]
) -> tuple[Progress, dict[str, Tensor]]:
    state, about = read_checked(folder / checkpoints.state_file)
    made_for = (about or {}).get("purpose", {})
    differing = [name for name, value in purpose.items() if made_for.get(name) != value]
    if differing:
        raise CheckpointError(f"made for another {', another '.join(differing)}")
    device = checkpoints.engine.ranks.device
    best = _best_of(*read_checked(folder / BEST), grids, device) if about["has_best"] else None
    return Progress(about["failed"], about["done"], best), state


def _tensors_of(best: BestIterate) -> dict[str, Tensor]:
    tensors = {}
    for name, linear in best.linears.items():
        tensors |= {f"{name}.codes": linear.codes_OI, f"{name}.scale": linear.scale_OG}
        tensors[f"{name}.zero_point"] = linear.zero_point_OG
    return tensors


def _best_of(tensors: dict[str, Tensor], about: dict, grids: dict[Matrix, Grid], device: torch.device) -> BestIterate:
    linears, by_name = {}, {matrix.name: grid for matrix, grid in grids.items()}
    for name in about["linears"]:  # in their order, which the tensors of a file do not keep
        parts = (tensors[f"{name}.{kind}"].to(device) for kind in ("codes", "scale", "zero_point"))
        linears[name] = QuantizedLinear(*parts, by_name[name])
    return BestIterate(linears, about["loss"])
