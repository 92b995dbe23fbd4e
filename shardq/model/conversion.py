"""The layout of a checkpoint by transformers' own conversion rules, without their values.

A rule's operations run on meta tensors: what they split, transpose or join is a view, whose offset and strides say
which part of one tensor is which of the other. So no operation and no architecture is known here by name.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from shardq.errors import CheckpointError, UnsupportedModelError
from shardq.formats.source import WeightSource
from shardq.model.layout import Layout, Part, Piece, check_shape, cut, moved, part_of, whole
from shardq.model.own_code import own_code
from shardq.model.transformers_internals import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    get_model_conversion_mapping,
    rename_source_key,
)

IN_ORDER = (Tensor.contiguous, Tensor.clone, Tensor.reshape, Tensor.flatten, torch.clone, torch.reshape, torch.flatten)
"""Functions whose result, where it is a copy, has the values of their first argument in the same order."""


def layout_of(source: WeightSource, model: PreTrainedModel) -> Layout:
    """The layout of a model on the meta device, as transformers would load it from a checkpoint.

    Tensors that the model does not have are in it under the names that they would have there, so that `with_views`
    finds experts that are stored apart where no rule of transformers joins them.

    Raises:
        CheckpointError: the tensors that a rule joins are not all there, or do not fit the model.
        UnsupportedModelError: a rule changes more than the places of values.
    """
    renamings, converters = _rules(model)
    expected, layout = model.state_dict(), Layout()
    converted: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in sorted(source.tensors, key=dot_natural_key):  # the order in which transformers joins them
        renamed, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, expected)
        if renamed not in expected and name in expected:
            renamed, pattern = name, None
        if renamed in expected and pattern is not None:
            converted[renamed][pattern].append(name)
        elif pattern is None:
            all_of = whole(source.tensors[name].shape)
            layout[renamed] = (Piece(name, all_of, all_of),)
    for renamed, names in converted.items():
        converter = next(rule for rule in converters if next(iter(names)) in rule.source_patterns)
        layout |= _converted(source, model, expected, converter, renamed, names)
    # A head that is stored in addition to the embedding is a separate matrix, even if the config says it is tied.
    tied = {name: other for name, other in model.all_tied_weights_keys.items() if name not in layout}
    layout |= {name: layout[other] for name, other in tied.items() if other in layout}
    for name in layout.keys() & expected.keys():
        check_shape(source.tensors, layout[name], tuple(expected[name].shape))
    return layout


def are_joined(model: PreTrainedModel, names: Iterable[str]) -> bool:
    """Whether transformers has a rule for each tensor of a checkpoint, such as an expert's weight, to make others."""
    renamings, converters = _rules(model)
    return all(rename_source_key(name, renamings, converters)[1] is not None for name in names)


def _rules(model: PreTrainedModel) -> tuple[list[WeightRenaming], list[WeightConverter]]:
    with own_code(type(model).__name__, "transformers does not tell under which names it is stored"):
        rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    return renamings, [rule for rule in rules if isinstance(rule, WeightConverter)]


def _converted(
    source: WeightSource,
    model: PreTrainedModel,
    expected: Mapping[str, Tensor],
    rule: WeightConverter,
    renamed: str,
    names: dict[str, list[str]],
) -> Layout:
    """The layout of the tensors that one rule makes of some of the source's.

    Args:
        expected: the model's tensors, by name.
        renamed: the first of the model's tensors.
        names: the source's tensors, by the rule's pattern that each matches.
    """
    first_name = next(iter(names.values()))[0]
    if len({len(found) for found in names.values()}) > 1:
        counts = ", ".join(f"{len(found)} like {found[0]}" for found in names.values())
        raise CheckpointError(
            f"{source.tensors[first_name].file}: of {renamed} there are {counts}; the checkpoint is incomplete"
        )
    kinds = ", ".join(type(operation).__name__ for operation in rule.operations)
    with _Places() as places, own_code(type(model).__name__, f"{kinds} fails on {first_name}, which becomes {renamed}"):
        values: dict[str, Any] = {
            pattern: [places.of_source(name, source.tensors[name].shape) for name in of_pattern]
            for pattern, of_pattern in names.items()
        }
        for operation in rule.operations:
            values = operation.convert(
                values,
                source_patterns=rule.source_patterns,
                target_patterns=rule.target_patterns,
                full_layer_name=renamed,
                model=model,
                config=model.config,
                missing_keys=None,
            )
    layout = Layout()
    for target, made in values.items():
        name = renamed.replace(rule.target_patterns[0], target)
        tensor = made[0] if isinstance(made, list) else made
        if name in expected and tensor.shape != expected[name].shape:
            of_pattern = ", ".join(f"{len(found)} like {found[0]}" for found in names.values())
            raise CheckpointError(
                f"{source.tensors[first_name].file}: tensors of {name} ({of_pattern}) make {list(tensor.shape)}, "
                f"config.json asks for {list(expected[name].shape)}; the checkpoint is incomplete, or config.json and "
                "weights belong to different models"
            )
        layout[name] = places.pieces_of(tensor)
        if not layout[name]:
            raise UnsupportedModelError(
                f"{source.tensors[first_name].file}: tensor {first_name} becomes {name} of {type(model).__name__} by "
                f"{kinds}, which is not supported: values change or cross, not only their places"
            )
    return layout


class _Places(TorchFunctionMode):
    """While it is active, follows which of the source's values tensors on the meta device show, through joins too."""

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[int, tuple[UntypedStorage, dict[Part, Piece]]] = {}

    def of_source(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A tensor on the meta device for one of the source."""
        made, all_of = torch.empty(shape, device="meta"), whole(shape)
        self._note(made, {all_of: Piece(name, all_of, all_of)})
        return made

    def pieces_of(self, tensor: Tensor) -> tuple[Piece, ...]:
        """The pieces that a tensor is made of; none where that is not known."""
        _, pieces = self._known.get(id(tensor.untyped_storage()), (None, {}))
        return cut(part_of(tensor), pieces)

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func in IN_ORDER and made.untyped_storage() is not args[0].untyped_storage():
            self._note(made, {piece.in_model: piece for piece in self.pieces_of(args[0])})
        if func in (torch.cat, torch.stack):
            axis = (kwargs or {}).get("dim", args[1] if len(args) > 1 else 0)
            sizes = [1 if func is torch.stack else tensor.shape[axis] for tensor in args[0]]
            views = made.split(sizes, axis)
            self._join(made, args[0], [view.squeeze(axis) for view in views] if func is torch.stack else views)
        return made

    def _join(self, joined: Tensor, tensors: list[Tensor], views: list[Tensor]) -> None:
        """Note a tensor that is made of others, each of which it shows in a view."""
        pieces: dict[Part, Piece] = {}
        for tensor, view in zip(tensors, views, strict=True):
            place = part_of(view)
            for piece in self.pieces_of(tensor):
                inner = moved(piece.in_model, place)
                pieces[inner] = replace(piece, in_model=inner)
        self._note(joined, pieces)

    def _note(self, tensor: Tensor, pieces: dict[Part, Piece]) -> None:
        storage = tensor.untyped_storage()
        self._known[id(storage)] = storage, pieces
