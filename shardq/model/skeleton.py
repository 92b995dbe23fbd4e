"""A model without weights: its decoder blocks on the meta device, and stand-ins in their places.

The names and shapes of the checkpoint's tensors are checked against the model before any weight is read.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from shardq.errors import CheckpointError, UnsupportedModelError
from shardq.formats.quantized_source import open_checkpoint
from shardq.formats.source import SourceTensor, WeightSource
from shardq.model.build import (
    build_on_meta,
    find_blocks,
    find_embeddings,
    find_head,
    find_runner,
    models_beside,
)
from shardq.model.conversion import are_joined, layout_of
from shardq.model.experts import adapt_experts
from shardq.model.layout import Layout, Piece, is_whole, tensor_in, with_views
from shardq.model.stand_in import StandIn
from shardq.model.transposed import adapt_transposed

FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Skeleton:
    """A checkpoint opened for streaming.

    Attributes:
        source: the checkpoint's tensors.
        model: the transformers model on the meta device, a StandIn in each block's place.
        blocks: the decoder blocks, on the meta device, in order.
        list_name: name of the list that holds them, such as `model.layers`.
        layout: where the values of each tensor of the model, and of its blocks, lie in the source.
        tensors: the same tensors as the source's.
        beside: prefixes of the names in models beside the text decoder, such as those for images.
        joins_experts: whether transformers joins experts that a checkpoint stores one by one; true where it has none.
    """

    source: WeightSource
    model: PreTrainedModel
    blocks: list[nn.Module]
    list_name: str
    layout: Layout
    tensors: dict[str, SourceTensor]
    beside: tuple[str, ...]
    joins_experts: bool

    @property
    def folder(self) -> Path:
        """The checkpoint's folder."""
        return self.source.folder

    @property
    def stand_ins(self) -> nn.ModuleList:
        """The stand-ins, in the order of the blocks."""
        return self.model.get_submodule(self.list_name)

    @property
    def named_blocks(self) -> dict[str, nn.Module]:
        """The blocks by their names in the checkpoint, such as `model.layers.0`, in order."""
        return {f"{self.list_name}.{number}": block for number, block in enumerate(self.blocks)}

    @property
    def names(self) -> list[str]:
        """The blocks' names in the checkpoint."""
        return list(self.named_blocks)

    @property
    def base_name(self) -> str:
        """Name of the model's part that takes tokens and calls the blocks: everything except the head.

        That of all that gives logits, where the head lies in that part too.
        """
        first, _, inner = self.list_name.removeprefix(f"{self.runner_name}.").partition(".")
        name = f"{self.runner_name}.{first}".removeprefix(".")
        return name if inner and self.head not in self.model.get_submodule(name).modules() else self.runner_name

    @property
    def runner_name(self) -> str:
        """Name of the model's part that takes tokens and gives logits; "" for the whole model, as in most."""
        return find_runner(self.model, self.list_name)

    @property
    def runner(self) -> PreTrainedModel:
        """That part."""
        return self.model.get_submodule(self.runner_name)

    @property
    def embeddings(self) -> nn.Embedding:
        """The table that tokens index."""
        return find_embeddings(self.model, self.list_name)

    @property
    def head(self) -> nn.Module:
        """The linear that gives the logits."""
        return find_head(self.model, self.list_name)

    def tensor(self, name: str) -> SourceTensor:
        """The source's tensor for the parameter or buffer `name`.

        Raises:
            CheckpointError: the checkpoint has no such tensor.
        """
        if name not in self.tensors:
            stored = self.model.all_tied_weights_keys.get(name, name)
            raise CheckpointError(
                f"{self.folder}: tensor {stored} is missing although config.json asks for it; "
                "the checkpoint is incomplete or in another layout"
            )
        return self.tensors[name]

    def is_transposed(self, name: str) -> bool:
        """Whether a matrix [O, I] of the model is all of a tensor [I, O] of the source."""
        first, *others = self.layout[name]
        stored = self.source.tensors[first.source]
        is_all = not others and first.num_values == math.prod(stored.shape)
        return is_all and not is_whole(first, stored)

    def block_tensors(self, block_index: int) -> dict[str, SourceTensor]:
        """The source's tensors for a block's parameters and persistent buffers, by name within the block."""
        return {
            name: self.tensor(f"{self.list_name}.{block_index}.{name}")
            for name in self.blocks[block_index].state_dict()
        }

    @cached_property
    def users(self) -> dict[str, list[int]]:
        """The blocks that use each of the source's tensors of blocks, by its name: several, where blocks share it."""
        users: dict[str, list[int]] = {}
        for block_index in range(len(self.blocks)):
            for name in self._pieces_of(block_index):
                users.setdefault(name, []).append(block_index)
        return users

    def held_tensors(self, block_index: int) -> dict[str, SourceTensor]:
        """Those of `block_tensors` that a block's file holds: what blocks share is in the file of the first."""
        held = {name for pieces in self.held_pieces(block_index).values() for name in pieces}
        return {name: tensor for name, tensor in self.block_tensors(block_index).items() if name in held}

    def held_pieces(self, block_index: int) -> dict[str, dict[str, Piece]]:
        """For each tensor of the source that a block's file holds, what `held_tensors` have of it, by their names."""
        pieces = self._pieces_of(block_index)
        return {name: of_name for name, of_name in pieces.items() if self.users[name][0] == block_index}

    def _pieces_of(self, block_index: int) -> dict[str, dict[str, Piece]]:
        found: dict[str, dict[str, Piece]] = {}
        for name in self.blocks[block_index].state_dict():
            for piece in self.layout[f"{self.list_name}.{block_index}.{name}"]:
                found.setdefault(piece.source, {})[name] = piece
        return found


def open_skeleton(folder: Path) -> Skeleton:
    """Open a checkpoint folder, however its weights are stored: build the model without weights, check both.

    Raises:
        CheckpointError: files are missing or do not fit config.json.
        UnsupportedModelError: a kind of model that cannot be quantized block by block.
    """
    return skeleton_of(open_checkpoint(folder))


def skeleton_of(source: WeightSource) -> Skeleton:
    """Build the model of an open checkpoint folder and check it; raises as `open_skeleton`."""
    model = build_on_meta(source.folder)
    stored, experts = layout_of(source, model), adapt_experts(model)
    views = experts | adapt_transposed(model)
    layout = with_views(stored, views)
    tensors = {
        name: tensor_in(source.tensors, name, tuple(tensor.shape), layout[name], views.get(name))
        for name, tensor in model.state_dict().items()
        if name in layout
    }
    list_name, block_list = find_blocks(model)
    beside = models_beside(model, (block_list, find_head(model, list_name), find_embeddings(model, list_name)))
    blocks = list(block_list)
    for number, block in enumerate(blocks):
        block_list[number] = StandIn(block)
    one_each = {view.fused: tensors[name].name for name, view in experts.items() if name in tensors}
    joins = are_joined(model, one_each.values())
    skeleton = Skeleton(source, model, blocks, list_name, layout, tensors, beside, joins)
    _check_tensors(skeleton)
    _check_pieces(skeleton)
    return skeleton


def _check_tensors(skeleton: Skeleton) -> None:
    expected = [
        (f"{name}.{inner}", tensor)
        for name, block in skeleton.named_blocks.items()
        for inner, tensor in block.state_dict().items()
    ]
    for name, tensor in [*skeleton.model.state_dict().items(), *expected]:
        found = skeleton.tensor(name)
        if tensor.is_floating_point() and found.dtype not in FLOAT_DTYPES:
            raise UnsupportedModelError(
                f"{found.file}: tensor {found.name} has dtype {found.dtype}, supported are "
                f"{', '.join(FLOAT_DTYPES)}; convert the checkpoint to bfloat16 first"
            )
        if tensor.dim() > 2 and (name, tensor) in expected and _is_of_experts(skeleton, name):
            raise UnsupportedModelError(
                f"{type(skeleton.model).__name__}: parameter {name} is {tensor.dim()}-dimensional, of fused experts; "
                "such blocks are not supported yet"
            )


def _check_pieces(skeleton: Skeleton) -> None:
    """Check that each tensor of the source that blocks use is one block's, all of it, or is shared as a whole."""
    for number in range(len(skeleton.blocks)):
        for name, pieces in skeleton.held_pieces(number).items():
            stored = skeleton.source.tensors[name]
            places = {piece.in_source for piece in pieces.values()}
            if sum(place.num_values for place in places) != math.prod(stored.shape):
                raise UnsupportedModelError(
                    f"{stored.file}: only part of tensor {name} is of block {skeleton.names[number]}; such checkpoints "
                    "are not supported"
                )


def _is_of_experts(skeleton: Skeleton, name: str) -> bool:
    """Whether a block's parameter with more than two dimensions is of fused experts, not a convolution or a state."""
    prefix, block = next(pair for pair in skeleton.named_blocks.items() if name.startswith(f"{pair[0]}."))
    inner = name.removeprefix(f"{prefix}.").rpartition(".")[0]
    return "expert" in f"{inner} {type(block.get_submodule(inner)).__name__}".lower()
