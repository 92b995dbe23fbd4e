"""The activations inside a block, by name, while it computes: to look at them, or to put others in their place.

`input` and `output` are the block's own, the residual stream; `NAME.input` and `NAME.output` those of a module in it
that has no submodules (linears, norms, activation functions); `NAME.query`, `NAME.key`, `NAME.value` and `NAME.context`
what enters, and leaves, the matrix products of an attention module that calls them through transformers' attention
interface, as nearly all do.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from shardq.model.ends import BlockArguments
from shardq.model.skeleton import to_meta

Tap = Callable[[str, Tensor], Tensor]
Wanted = Callable[[str], bool]
ATTENTION_INPUTS = ("query", "key", "value")


def activation_names(block: nn.Module, arguments: BlockArguments, hidden_shape: tuple[int, int, int]) -> list[str]:
    """The activations that a block's forward reaches, in the order in which it first does.

    Args:
        block: on the meta device; nothing is computed.
        hidden_shape: samples, tokens, channels.
    """
    names: dict[str, None] = {}

    def note(name: str, values: Tensor) -> Tensor:
        names[name] = None
        return values

    args, kwargs = to_meta((arguments.args, arguments.kwargs))
    with torch.no_grad(), tapped(block, note):
        block(torch.empty(hidden_shape, device="meta"), *args, **kwargs)
    return list(names)


@contextmanager
def tapped(block: nn.Module, tap: Tap, wanted: Wanted = lambda name: True) -> Iterator[None]:
    """While the body runs, `tap` gets each activation that is wanted, and what it gives goes on in its place."""
    with ExitStack() as stack:
        for module_name, module in block.named_modules():
            is_inner = module is not block and next(module.children(), None) is not None
            if is_inner or isinstance(module, nn.Dropout | nn.Identity):
                continue
            prefix = f"{module_name}." if module_name else ""
            if wanted(f"{prefix}input"):
                stack.callback(module.register_forward_pre_hook(_on_input(f"{prefix}input", tap)).remove)
            if wanted(f"{prefix}output"):
                stack.callback(module.register_forward_hook(_on_output(f"{prefix}output", tap)).remove)
        attention = {module: name for name, module in block.named_modules() if hasattr(module, "config")}
        if any(wanted(f"{name}.{kind}") for name in attention.values() for kind in (*ATTENTION_INPUTS, "context")):
            for implementation in {module.config._attn_implementation for module in attention}:
                stack.enter_context(_attention_replaced(implementation, attention, tap, wanted))
        yield


def _on_input(name: str, tap: Tap) -> Callable:
    def hook(module: nn.Module, inputs: tuple) -> tuple | None:
        return (tap(name, inputs[0]), *inputs[1:]) if inputs and _is_activation(inputs[0]) else None

    return hook


def _on_output(name: str, tap: Tap) -> Callable:
    def hook(module: nn.Module, inputs: tuple, output: Any) -> Any:
        if isinstance(output, tuple) and output and _is_activation(output[0]):
            return (tap(name, output[0]), *output[1:])
        return tap(name, output) if _is_activation(output) else None

    return hook


def _is_activation(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


@contextmanager
def _attention_replaced(
    implementation: str, names_of: dict[nn.Module, str], tap: Tap, wanted: Wanted
) -> Iterator[None]:
    """Have one entry of transformers' table of attention functions pass its inputs and its output through `tap`."""
    former = ALL_ATTENTION_FUNCTIONS.get(implementation)

    def tapped_if_wanted(name: str, values: Tensor) -> Tensor:
        return tap(name, values) if wanted(name) else values

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args, **kwargs) -> tuple:
        # `eager` is in no table: each model's file has a function of its own under one name.
        function = former or sys.modules[type(module).__module__].eager_attention_forward
        name = names_of[module]
        named = zip(ATTENTION_INPUTS, (query, key, value), strict=True)
        inputs = [tapped_if_wanted(f"{name}.{kind}", values) for kind, values in named]
        context, *others = function(module, *inputs, *args, **kwargs)
        return tapped_if_wanted(f"{name}.context", context), *others

    ALL_ATTENTION_FUNCTIONS[implementation] = attend
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS[implementation]
        if ALL_ATTENTION_FUNCTIONS.get(implementation) is not former:  # replaced before, by an outer body
            ALL_ATTENTION_FUNCTIONS[implementation] = former
