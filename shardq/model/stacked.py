"""Experts that a model's own code multiplies with as one stack of weights: each gets linears, which do it instead.

The code stays as it is. A stand-in in the stack's place has the linears multiply, so hooks and quantizers see them.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

HALVES = {"gate_up_proj": ("gate_proj", "up_proj")}  # a stacked parameter of two linears: their names, in this order


class Stack:
    """Stands for a stack [E, ...] of weights that experts' linears have; only products with it can be computed.

    Attributes:
        experts: the linears of each expert, whose outputs are joined.
        shape: of the stack as the code sees it.
        is_transposed: whether it is [E, I, O], not [E, O, I].
    """

    def __init__(self, experts: list[list[nn.Linear]], shape: tuple[int, int, int], is_transposed: bool):
        self.experts, self.shape, self.is_transposed = experts, torch.Size(shape), is_transposed

    def transpose(self, first: int, second: int) -> "Stack":
        """The stack with its last two axes exchanged."""
        if {first % 3, second % 3} != {1, 2}:
            raise TypeError("only the last two axes of stacked experts can be exchanged")
        num, rows, columns = self.shape
        return Stack(self.experts, (num, columns, rows), not self.is_transposed)

    @classmethod
    def __torch_function__(cls, function: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> Any:
        """The batched product of inputs [E, T, I] with a stack [E, I, O]."""
        hidden_ETI, stack = args if len(args) == 2 else (None, None)
        if (
            function not in (torch.bmm, torch.matmul)
            or kwargs
            or not isinstance(stack, Stack)
            or not stack.is_transposed
        ):
            raise TypeError(f"{getattr(function, '__name__', function)} of stacked experts is not supported")
        pairs = zip(hidden_ETI.unbind(), stack.experts, strict=True)
        return torch.stack([torch.cat([linear(hidden_TI) for linear in expert], -1) for hidden_TI, expert in pairs])


def split_stacks(module: nn.Module, width: int) -> dict[str, tuple[str, Callable[[Tensor], Tensor]]]:
    """Replace a module's stacked parameters by linears of numbered experts, `N.NAME`, and stand-ins.

    Args:
        module: on the meta device, whose first parameter takes hidden states, and whose last gives them.
        width: channels of the hidden states.

    Returns:
        for each new weight, by name within the module, the stacked parameter's name and the weight's view of it;
        nothing where the shapes do not tell which axis is which.
    """
    stacks = dict(module.named_parameters(recurse=False))
    if any(parameter.dim() != 3 for parameter in stacks.values()):
        return {}
    shapes = [tuple(parameter.shape) for parameter in stacks.values()]
    takes_first, takes_last = (shapes[0][axis] == width == shapes[-1][3 - axis] for axis in (1, 2))
    if takes_first == takes_last or len({shape[0] for shape in shapes}) > 1:
        return {}
    views: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {}
    for number in range(shapes[0][0]):
        module.add_module(str(number), nn.Module())
    for stem, parameter in stacks.items():
        names, (_, *sizes) = HALVES.get(stem, (stem,)), parameter.shape
        num_inputs, num_outputs = sizes if takes_first else reversed(sizes)
        experts: list[list[nn.Linear]] = []
        for number in range(shapes[0][0]):
            experts.append([])
            for half, name in enumerate(names):
                made = nn.Linear(num_inputs, num_outputs // len(names), False, device="meta", dtype=parameter.dtype)
                experts[-1].append(made.requires_grad_(parameter.requires_grad))
                module.get_submodule(str(number)).add_module(name, made)
                of = partial(_part, number=number, half=half, halves=len(names), transposed=takes_first)
                views[f"{number}.{name}.weight"] = stem, of
        delattr(module, stem)
        setattr(module, stem, Stack(experts, tuple(parameter.shape), takes_first))
    return views


def in_stack(block: nn.Module, name: str) -> bool:
    """Whether a linear of a block, by name, is of an expert that the model's code multiplies with as one of a stack."""
    parent = name.rpartition(".")[0].rpartition(".")[0]
    return any(isinstance(value, Stack) for value in vars(block.get_submodule(parent)).values())


def _part(stack: Tensor, number: int, half: int, halves: int, transposed: bool) -> Tensor:
    """View of a linear's weight [O, I] in a stacked parameter."""
    return (stack[number].t() if transposed else stack[number]).chunk(halves)[half]
