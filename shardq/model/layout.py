"""Where the values of a model's tensors lie in its source, to read them and to write them in the same places.

A tensor of the model may be one of the source, a part of one, such as an expert's weight, or made of several.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from os.path import commonprefix

import torch
from torch import Tensor

from shardq.errors import CheckpointError, UnsupportedModelError
from shardq.formats.ranges import range_of
from shardq.formats.source import Read, Rows, SourceTensor, values_of
from shardq.model.experts import FusedView


@dataclass(frozen=True)
class Part:
    """Some values of a contiguous tensor, as a strided view of it; the stride of an axis of size 1 is 0."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int = 0

    @property
    def num_values(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def end(self) -> int:
        """The place after its last value in the flat tensor."""
        return self.offset + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True)) + 1

    def of(self, tensor: Tensor) -> Tensor:
        """The part of a contiguous tensor; a view."""
        return tensor.as_strided(self.shape, self.stride, tensor.storage_offset() + self.offset)


@dataclass(frozen=True)
class Piece:
    """Values that a tensor of the source and one of the model share, as the part of each."""

    source: str
    in_source: Part
    in_model: Part

    @property
    def num_values(self) -> int:
        """Number of values."""
        return self.in_model.num_values


Layout = dict[str, tuple[Piece, ...]]
"""For each tensor of a model that is stored, by name, the pieces that it is made of."""


def whole(shape: Iterable[int]) -> Part:
    """All of a tensor of a shape."""
    return part_of(torch.empty(tuple(shape), device="meta"))


def part_of(view: Tensor) -> Part:
    """The part of its storage that a tensor shows."""
    stride = tuple(step if size > 1 else 0 for size, step in zip(view.shape, view.stride(), strict=True))
    return Part(tuple(view.shape), stride, view.storage_offset())


def is_whole(piece: Piece, stored: SourceTensor) -> bool:
    """Whether a piece is all of a stored tensor, and all of the model's in the same order."""
    return piece.in_source == piece.in_model == whole(stored.shape)


def check_shape(tensors: Mapping[str, SourceTensor], pieces: tuple[Piece, ...], shape: tuple[int, ...]) -> None:
    """Check that a checkpoint's tensor that is one of a model has the shape that the model asks for.

    Raises:
        CheckpointError: it has another one.
    """
    stored = tensors[pieces[0].source]
    if len(pieces) == 1 and is_whole(pieces[0], stored) and stored.shape != shape:
        raise CheckpointError(
            f"{stored.file}: tensor {stored.name} has shape {list(stored.shape)}, config.json asks for {list(shape)}; "
            "config.json and weights belong to different models"
        )


def cut(part: Part, pieces: Mapping[Part, Piece]) -> tuple[Piece, ...]:
    """The pieces that a part of a tensor is made of; none where it crosses the tensor's.

    Args:
        pieces: what the tensor is made of, by their place in it.
    """
    here = whole(part.shape)
    if part in pieces:
        return (replace(pieces[part], in_model=here),)
    found = []
    for place, piece in pieces.items():
        if (inside := _within(part, place)) is not None:
            return (replace(piece, in_source=_placed(part.shape, inside, piece.in_source), in_model=here),)
        if (inside := _within(place, part)) is not None:
            found.append(replace(piece, in_model=_placed(place.shape, inside, here)))
    return tuple(found) if sum(piece.num_values for piece in found) == part.num_values else ()


def moved(part: Part, place: Part) -> Part:
    """A part of a tensor as a part of another, which shows the tensor in a place."""
    inside = _within(part, whole(place.shape))
    assert inside is not None
    return _placed(part.shape, inside, place)


def with_views(layout: Layout, views: Mapping[str, FusedView]) -> Layout:
    """The layout of a model in which some tensors have been replaced by views of them.

    Args:
        views: by name of the new tensor; one that is stored under that name is that.

    Raises:
        UnsupportedModelError: a view crosses the pieces of the tensor that it is of.
    """
    fused = {view.fused for view in views.values()}
    found = {name: pieces for name, pieces in layout.items() if name not in fused}
    pieces = {name: {piece.in_model: piece for piece in layout[name]} for name in fused & layout.keys()}
    for name, view in views.items():
        if view.fused in pieces:
            found[name] = cut(part_of(view.of(torch.empty(view.shape, device="meta"))), pieces[view.fused])
            if not found[name]:
                raise UnsupportedModelError(f"{name} cannot be told apart in {view.fused} as the checkpoint stores it")
    return found


def tensor_in(
    tensors: Mapping[str, SourceTensor],
    name: str,
    shape: tuple[int, ...],
    pieces: tuple[Piece, ...],
    view: FusedView | None = None,
) -> SourceTensor:
    """A model's tensor as one of a checkpoint's, or as made of parts of some, of which no more is read.

    Args:
        tensors: of the checkpoint, by name.
        name, shape: of the model's tensor.
        view: its place in the tensor that it is part of as transformers builds the model; its name is then one beside
            that.

    Raises:
        CheckpointError: as `check_shape`.
        UnsupportedModelError: the parts are of several dtypes.
    """
    check_shape(tensors, pieces, shape)
    if len(pieces) == 1 and is_whole(pieces[0], tensors[pieces[0].source]):
        return tensors[pieces[0].source]
    ranges = [range_of(tensors[piece.source], piece.in_source.offset, piece.in_source.end) for piece in pieces]
    if len({tensor.dtype for tensor in ranges}) > 1:
        raise UnsupportedModelError(
            f"{ranges[0].file}: {name} is stored in parts of several dtypes ({pieces[0].source} is {ranges[0].dtype}); "
            "convert the checkpoint to bfloat16 first"
        )

    def decode(read: Read, rows: Rows) -> Tensor:
        parts = (
            (piece, replace(piece.in_source, offset=0).of(values_of(tensor, read).contiguous()))
            for piece, tensor in zip(pieces, ranges, strict=True)
        )
        values = put_together(shape, ((piece.in_model, part) for piece, part in parts))
        return values if rows is None else values[rows]

    stored = {info.name: info for tensor in ranges for info in tensor.stored}
    name = _beside(name, view.fused, pieces[0].source) if view else name
    return SourceTensor(name, ranges[0].dtype, shape, tuple(stored.values()), decode)


def _beside(name: str, fused: str, stored: str) -> str:
    """The name of a part beside that of the tensor in which it is stored, where only their beginnings differ.

    `a.experts.0.up_proj` of `a.experts.gate_up_proj`, stored as `b.experts.gate_up_proj`, is `b.experts.0.up_proj`.
    """
    num_same = len(commonprefix([fused[::-1], stored[::-1]]))
    start = fused[: len(fused) - num_same]
    return stored[: len(stored) - num_same] + name.removeprefix(start) if name.startswith(start) else name


def put_together(shape: tuple[int, ...], parts: Iterable[tuple[Part, Tensor]]) -> Tensor:
    """A contiguous tensor of parts, each given with its place; the only one in its place is returned as it is."""
    values: Tensor | None = None
    for place, part in parts:
        if values is None and place == whole(shape):
            # Not a view of more, which would stay in memory with it.
            return part.clone(memory_format=torch.contiguous_format) if _is_view(part) else part
        values = part.new_empty(shape) if values is None else values
        place.of(values).copy_(part)
    assert values is not None
    return values


def _is_view(tensor: Tensor) -> bool:
    return not tensor.is_contiguous() or tensor.untyped_storage().nbytes() > tensor.nbytes


def _within(inner: Part, outer: Part) -> tuple[list[int], list[list[int]]] | None:
    """Where a part lies in another of the same tensor: the index of its first value, and the step of each of its axes.

    None where it is not within the other, or not at equal steps.
    """
    if inner.offset < outer.offset:
        return None
    first = _index(inner.offset - outer.offset, outer)
    steps = [_index(step, outer) for step in inner.stride]
    if first is None or None in steps:
        return None
    for axis, size in enumerate(outer.shape):
        last = first[axis] + sum((count - 1) * step[axis] for count, step in zip(inner.shape, steps, strict=True))
        if last >= size:
            return None
    return first, steps


def _index(distance: int, part: Part) -> list[int] | None:
    """The index of the value of a part that is some places behind its first; None where there is none."""
    index = [0] * len(part.shape)
    for axis in sorted(range(len(part.shape)), key=lambda axis: -part.stride[axis]):
        if part.stride[axis]:
            index[axis], distance = divmod(distance, part.stride[axis])
    return None if distance else index


def _placed(shape: tuple[int, ...], inside: tuple[list[int], list[list[int]]], part: Part) -> Part:
    """The part of a tensor that lies in a part of it as `_within` says."""
    first, steps = inside
    away = [sum(count * stride for count, stride in zip(index, part.stride, strict=True)) for index in (first, *steps)]
    stride = tuple(step if size > 1 else 0 for size, step in zip(shape, away[1:], strict=True))
    return Part(shape, stride, part.offset + away[0])
