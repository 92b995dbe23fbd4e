"""A run as its folder holds it, for programs that look at what came out: blocks, grids, codes, losses, times."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shardq.errors import ResumeError
from shardq.formats.block_file import read_block, read_grids
from shardq.logs import Event
from shardq.quant.grid import Grid
from shardq.quant.quantized import QuantizedLinear
from shardq.rundir.folder import RunFolder
from shardq.rundir.record import RunRecord

OF_FILES = ("block", "files", "bytes", "source")  # of a ledger line: what else it holds are facts


@dataclass(frozen=True, kw_only=True)
class FinishedBlock:
    """A decoder block that a run has finished.

    Attributes:
        name: in the checkpoint, such as `model.layers.0`; empty where nothing of the finished blocks is quantized.
        grids: of its quantized matrices, by their names in the checkpoint.
        facts: what the ledger keeps of its training: `loss_before` and `loss_after`, or `divergence_before` and
            `divergence_after`, as in `QuantizeSummary`; `world_size`, the number of ranks; and where trainings have
            met numbers that are not finite, `failed_tries` and `gave_up`.
        seconds: of rank 0's spans of this block, by name; attempts that came to nothing are included.
        num_bytes: of its files.
        path: of the file that holds its codes.
    """

    index: int
    name: str
    grids: dict[str, Grid]
    facts: dict[str, Any]
    seconds: dict[str, float]
    num_bytes: int
    path: Path

    def matrices(self) -> dict[str, QuantizedLinear]:
        """Codes, scales and zero points of the quantized matrices, read from the file, by their names.

        Raises:
            CheckpointError: the file is damaged.
        """
        return read_block(self.path)

    def weights(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """The quantized weights [O, I], by the names of their matrices.

        Raises:
            CheckpointError: as `matrices`.
        """
        return {name: matrix.dequantized(dtype) for name, matrix in self.matrices().items()}


@dataclass(frozen=True, kw_only=True)
class LoadedRun:
    """A run, finished or not.

    Attributes:
        options: all that decide its result, in sections as in a recipe.
        blocks: those that are finished, in order.
        events: spans of all ranks.
    """

    output: Path
    is_finished: bool
    options: dict[str, Any]
    blocks: list[FinishedBlock]
    events: list[Event]


def load_run(output: Path) -> LoadedRun:
    """Read what a folder holds of a run; codes are read when they are asked for.

    Raises:
        ResumeError: the folder holds no run, or its record is damaged.
        CheckpointError: a block's file is missing or damaged.
    """
    record, folder = RunRecord.read(output), RunFolder(output)
    if not folder.manifest.exists():
        raise ResumeError(record.why_unfinished())
    events = record.events()
    grids = {number: read_grids(folder.block(number)) for number in record.blocks}
    blocks = [
        FinishedBlock(
            index=number,
            name=_block_name(grids, number),
            grids=grids[number],
            facts={name: value for name, value in entry.items() if name not in OF_FILES},
            seconds=_seconds(events, number),
            num_bytes=sum(entry["bytes"].values()),
            path=folder.block(number),
        )
        for number, entry in record.blocks.items()
    ]
    return LoadedRun(
        output=output,
        is_finished=record.is_finished,
        options=record.manifest()["options"],
        blocks=blocks,
        events=events,
    )


def _block_name(grids: dict[int, dict[str, Grid]], index: int) -> str:
    """A block's name: that of the list of blocks, which every matrix's name begins with, and the block's number."""
    for number, names in grids.items():
        for name in names:
            if found := re.match(rf"(.*?)\.{number}\.", name):
                return f"{found[1]}.{index}"
    return ""


def _seconds(events: list[Event], index: int) -> dict[str, float]:
    seconds: dict[str, float] = {}
    for event in events:
        if event.rank == 0 and event.facts.get("block") == index:
            seconds[event.span] = seconds.get(event.span, 0.0) + event.seconds
    return seconds
