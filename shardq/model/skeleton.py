"""A model without weights: its decoder blocks on the meta device, and stand-ins in their places.

The names and shapes of the checkpoint's tensors are checked against the model before any weight is read.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from shardq.errors import CheckpointError, UnsupportedModelError
from shardq.formats.source import SourceTensor, WeightSource, open_source
from shardq.model.build import build_on_meta, find_blocks
from shardq.model.conversion import layout_of
from shardq.model.experts import adapt_experts
from shardq.model.layout import Layout, Piece, tensor_in, with_views
from shardq.model.own_code import own_code
from shardq.torch_internals import tree_map_only

FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")


class StandIn(nn.Module):
    """Takes a block's place in the model: records what the model passes, returns the hidden states unchanged.

    They are returned in the block's form, single or first of a tuple; further outputs of the block are on the meta
    device, without values. Plain attributes of the block are copied, because some models read them (such as
    `attention_type`). If `injected` is set, it is returned instead, so that the model's own code turns given hidden
    states into logits. If `answer` is set, it is called with the hidden states and the other arguments, and gives the
    return value.
    """

    def __init__(self, block: nn.Module):
        super().__init__()
        own = {"training"}
        self.__dict__.update({k: v for k, v in vars(block).items() if not k.startswith("_") and k not in own})
        self.injected: Tensor | None = None
        self.seen: tuple[Tensor, tuple, dict] | None = None
        self.answer: Callable[[Tensor, tuple, dict], object] | None = None
        self._block = (block,)  # in a tuple: not a submodule, whose weights the model would expect
        self._returns: object = None

    def forward(self, *args, **kwargs):
        """Record the call."""
        hidden, args = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
        self.seen = (hidden, args, kwargs)
        if self.answer is not None:
            return self.answer(hidden, args, kwargs)
        return self.returned(hidden if self.injected is None else self.injected)

    def returned(self, hidden: Tensor) -> object:
        """Hidden states in the form in which the block returns them; it must have been called."""
        if self._returns is None:
            self._returns = self.on_meta(to_meta(self.seen))
        return (hidden, *self._returns[1:]) if isinstance(self._returns, tuple | list) else hidden

    @torch.no_grad()
    def on_meta(self, call: tuple[Tensor, tuple, dict]) -> object:
        """The block's return value for a call on the meta device: structure and shapes, without computing.

        Raises:
            UnsupportedModelError: the block does not take that.
        """
        block = self._block[0]
        hidden, args, kwargs = call
        what = (
            "a decoder block must take any number of sequences with the arguments that the model passes it for one; it "
            f"does not take {len(hidden)}"
        )
        with own_code(type(block).__name__, what):
            return block(hidden, *args, **kwargs)


def to_meta(values: Any) -> Any:
    """The same tuples and dicts with every tensor in them on the meta device."""
    return tree_map_only(Tensor, lambda tensor: tensor.to("meta"), values)


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
    """

    source: WeightSource
    model: PreTrainedModel
    blocks: list[nn.Module]
    list_name: str
    layout: Layout
    tensors: dict[str, SourceTensor]

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
        """Name of the model's part that takes tokens and calls the blocks: everything except the head."""
        first, _, inner = self.list_name.partition(".")
        return first if inner else ""

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

    def block_tensors(self, block_index: int) -> dict[str, SourceTensor]:
        """The source's tensors for a block's parameters and persistent buffers, by name within the block."""
        return {
            name: self.tensor(f"{self.list_name}.{block_index}.{name}")
            for name in self.blocks[block_index].state_dict()
        }

    def stored_in_block(self, block_index: int) -> dict[str, dict[str, Piece]]:
        """The source's tensors that a block is stored in, by name; of each the pieces, by name within the block."""
        found: dict[str, dict[str, Piece]] = {}
        for name in self.blocks[block_index].state_dict():
            for piece in self.layout[f"{self.list_name}.{block_index}.{name}"]:
                found.setdefault(piece.source, {})[name] = piece
        return found


def open_skeleton(folder: Path) -> Skeleton:
    """Open a checkpoint folder: read config.json and the shards' headers, build the model without weights, check both.

    Raises:
        CheckpointError: files are missing or do not fit config.json.
        UnsupportedModelError: a kind of model that cannot be quantized block by block.
    """
    return skeleton_of(open_source(folder))


def skeleton_of(source: WeightSource) -> Skeleton:
    """Build the model of an open checkpoint folder and check it; raises as `open_skeleton`."""
    model = build_on_meta(source.folder)
    layout = with_views(layout_of(source, model), adapt_experts(model))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tensors = {name: tensor_in(source.tensors, name, shapes[name], layout[name]) for name in shapes if name in layout}
    list_name, block_list = find_blocks(model)
    blocks = list(block_list)
    for number, block in enumerate(blocks):
        block_list[number] = StandIn(block)
    skeleton = Skeleton(source, model, blocks, list_name, layout, tensors)
    _check_tensors(skeleton)
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
        if tensor.dim() > 2 and (name, tensor) in expected:
            raise UnsupportedModelError(
                f"{type(skeleton.model).__name__}: parameter {name} is {tensor.dim()}-dimensional"
                f"{_what_it_is_of(skeleton, name)}; such blocks are not supported yet"
            )


def _what_it_is_of(skeleton: Skeleton, name: str) -> str:
    """The kind of a block's parameter with more than two dimensions, in words where it is known."""
    prefix, block = next(pair for pair in skeleton.named_blocks.items() if name.startswith(f"{pair[0]}."))
    inner = name.removeprefix(f"{prefix}.").rpartition(".")[0]
    owner = block.get_submodule(inner)
    if isinstance(owner, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return f", of a convolution ({type(owner).__name__})"
    return ", of fused experts" if "expert" in f"{inner} {type(owner).__name__}".lower() else ""
