"""The calls of a block compared, leaf by leaf, by the names that the block's own forward has for its arguments."""

import inspect
from collections.abc import MutableMapping
from enum import Enum
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from shardq.model.arguments import Call
from shardq.model.skeleton import Skeleton
from shardq.torch_internals import keystr, tree_flatten, tree_flatten_with_path

PLAIN = (NoneType, bool, int, float, str, bytes, Enum, torch.dtype, torch.device)
ROUNDING = 1e-5  # allowed difference of values computed twice, as a share of the largest


def argument_names(skeleton: Skeleton, number: int, call: Call) -> list[str]:
    """The name that the block's own forward has for each leaf of a call's arguments."""
    parameters = list(inspect.signature(skeleton.blocks[number].forward).parameters)[1:]
    names = []
    for path, _ in tree_flatten_with_path((call.args, call.kwargs))[0]:
        outer, inner = path[1], path[2:]
        is_positional = path[0].idx == 0
        known = is_positional and outer.idx < len(parameters)
        name = parameters[outer.idx] if known else f"argument {outer.idx + 1}" if is_positional else outer.key
        names.append(name + keystr(inner))
    return names


def is_equal(one: object, other: object) -> bool:
    """Whether two leaves are the same except for rounding; mutable objects are not."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        same_kind = one.shape == other.shape and one.dtype == other.dtype
        if not same_kind or not one.is_floating_point():
            return same_kind and torch.equal(one, other)
        # Two sequences at once may be rounded differently from one.
        rounding = ROUNDING * one.nan_to_num(0, 0, 0).abs().amax().item() if one.numel() else 0.0
        return torch.allclose(one, other, rtol=ROUNDING, atol=rounding, equal_nan=True)
    return type(one) is type(other) and isinstance(one, PLAIN) and (one == other or one != one)


def differing(skeleton: Skeleton, number: int, call: Call, passed: Call) -> list[str]:
    """Names of the arguments in which a call of a block differs from another for as many tokens or more."""
    leaves, structure = tree_flatten((call.args, call.kwargs))
    others, other_structure = tree_flatten((passed.args, passed.kwargs))
    if structure != other_structure:
        return ["their structure"]
    names = argument_names(skeleton, number, call)
    return [name for name, one, other in zip(names, leaves, others, strict=True) if not _begins(one, other)]


def _begins(short: Any, long: Any) -> bool:
    """Whether a value is the beginning of another, in every dimension in which that is longer."""
    if isinstance(short, Tensor) and isinstance(long, Tensor) and short.dim() == long.dim():
        for dim, size in enumerate(short.shape):
            long = long.narrow(dim, 0, min(size, long.shape[dim]))
        return is_equal(*torch.broadcast_tensors(short, long)) if _can_broadcast(short, long) else False
    is_mask = (isinstance(value, Tensor | NoneType) for value in (short, long))
    # None stands for a mask that is plainly causal, as that of few tokens may be.
    return isinstance(short, MutableMapping) or is_equal(short, long) or (short is None and all(is_mask))


def _can_broadcast(one: Tensor, other: Tensor) -> bool:
    return all(1 in sizes or sizes[0] == sizes[1] for sizes in zip(one.shape, other.shape, strict=True))
