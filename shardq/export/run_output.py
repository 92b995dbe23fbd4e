"""What a run writes of its model: each block's files as it goes on, and those that complete it."""

from collections.abc import Container, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from shardq.export.checkpoint import Checkpoint, linears_left
from shardq.export.model_card import model_card
from shardq.files import write_text
from shardq.formats.block_file import Linears, LinearsInFiles, renamed, write_block_by_one
from shardq.matrix import Matrix
from shardq.model.block import BlockPlan
from shardq.model.build import factory_of
from shardq.model.skeleton import Skeleton
from shardq.quant.activation import ActivationGrid
from shardq.quant.quantized import QuantizedLinear
from shardq.rundir.account import account_of
from shardq.rundir.block_output import WriteShard, write_block_files, write_run_files
from shardq.rundir.folder import MODEL_CARD, RunFolder
from shardq.rundir.manifest import quant_options
from shardq.rundir.plan import Plan
from shardq.rundir.record import RunRecord


@dataclass(frozen=True)
class RunOutput:
    """The result of a run, in its folder.

    Attributes:
        skeleton: skeleton of the source.
        form: how the folder's own checkpoint holds the linears.
    """

    folder: Path
    skeleton: Skeleton
    plan: Plan
    form: Checkpoint

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the model that programs build from the folder."""
        grids = self.plan.grids.values()
        return self.form.weight_dtype(self.skeleton, next(iter(grids)))  # all of them keep scales in the same one

    def write_block(
        self,
        block: BlockPlan,
        linears: Linears,
        activations: dict[str, ActivationGrid],
        device: torch.device,
        copies: dict[Path, Checkpoint],
    ) -> list[Path]:
        """Write a finished block's files, and its shards in further checkpoints; give the files.

        Args:
            linears, activations: linears and grids of activations, by name within the block.
            device: as in `write_block_files`.
            copies: the further checkpoints, by folder.
        """
        full = renamed(linears, {block.full_name(matrix): matrix.name for matrix in block.grids})
        grids = {f"{block.name}.{name}": grid for name, grid in activations.items()}
        return self._write(block, full, grids, device, copies)

    def write_block_by_one(
        self,
        block: BlockPlan,
        linears: Iterable[tuple[Matrix, QuantizedLinear]],
        device: torch.device,
        copies: dict[Path, Checkpoint],
    ) -> list[Path]:
        """Write as `write_block` linears of which each is made when the one before has been written."""
        path = RunFolder(self.folder).block(block.index)
        shapes = {block.full_name(matrix): (matrix.shape, grid) for matrix, grid in block.grids.items()}
        write_block_by_one(path, shapes, ((block.full_name(matrix), linear) for matrix, linear in linears))
        full = LinearsInFiles(dict.fromkeys(shapes, path), {name: name for name in shapes})
        return self._write(block, full, {}, device, copies, has_codes=True)

    def _write(
        self,
        block: BlockPlan,
        full: Linears,
        grids: dict[str, ActivationGrid],
        device: torch.device,
        copies: dict[Path, Checkpoint],
        has_codes: bool = False,
    ) -> list[Path]:
        def writer(form: Checkpoint) -> WriteShard:
            return partial(form.write_shard, skeleton=self.skeleton, block_index=block.index)

        files = write_block_files(self.folder, self.plan, block, full, grids, writer(self.form), device, has_codes)
        for folder, form in copies.items():
            writer(form)(folder / self.plan.block_shard(block.index), full, grids)
        return files

    def write_end(self, record: RunRecord, kept: Container[Path] = ()) -> list[Path]:
        """Write the files that complete a run whose blocks are all written, except large ones that stay; give all.

        Args:
            record: the run's, with all blocks.
        """
        skeleton, grids = self.skeleton, self.plan.grids
        scheme = self.form.described(self.folder, skeleton, grids, linears_left(skeleton, grids))
        files = write_run_files(self.folder, skeleton, self.plan, self.dtype, scheme, kept)
        account = account_of(skeleton, grids, quant_options(record.manifest()["options"]["quant"]).ignored)
        factory, path = factory_of(skeleton.model), self.folder / MODEL_CARD
        write_text(path, model_card(record, skeleton.folder, grids, self.form, factory, 0.0, account))
        return [*files, path]
