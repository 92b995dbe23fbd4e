"""Access to the activations inside a block, by name, while it computes: to read them, or to replace them.

`input` and `output` are the block's own, the residual stream; `NAME.input` and `NAME.output` those of a module in it
that has no submodules (linears, norms, activation functions); `NAME.query`, `NAME.key`, `NAME.value` and `NAME.context`
what enters, and leaves, the matrix products of an attention module that calls them through transformers' attention
interface, as nearly all do; `NAME.scores` and `NAME.probabilities`, where that is torch's own attention, what the first
product gives, before the mask, and what the softmax makes of it.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from shardq.model.arguments import BlockArguments
from shardq.model.attention import is_causal, scale_of
from shardq.model.own_code import own_code
from shardq.model.transformers_internals import attention_name

Tap = Callable[[str, Tensor], Tensor]
Wanted = Callable[[str], bool]
ATTENTION_INPUTS, BETWEEN = ("query", "key", "value"), ("scores", "probabilities")


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

    hidden_NTD, args, kwargs = arguments.on_meta(hidden_shape)
    with own_code(type(block).__name__, "its activations cannot be found"), torch.no_grad(), tapped(block, note):
        block(hidden_NTD, *args, **kwargs)
    return list(names)


@contextmanager
def tapped(block: nn.Module, tap: Tap, wanted: Wanted = lambda name: True) -> Iterator[None]:
    """While the body runs, `tap` gets each wanted activation, and its return value takes the activation's place."""
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
        if any(
            wanted(f"{name}.{kind}") for name in attention.values() for kind in (*ATTENTION_INPUTS, *BETWEEN, "context")
        ):
            for implementation in {attention_name(module.config) for module in attention}:
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

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *args, **kwargs
    ) -> tuple:
        # `eager` is in no table: each model's file has its own function of the same name.
        function = former or sys.modules[type(module).__module__].eager_attention_forward
        name = names_of[module]

        def tapped_if_wanted(kind: str, values: Tensor) -> Tensor:
            return tap(f"{name}.{kind}", values) if wanted(f"{name}.{kind}") else values

        inputs = [
            tapped_if_wanted(kind, value) for kind, value in zip(ATTENTION_INPUTS, (query, key, value), strict=True)
        ]
        context, others = None, [None]
        shows = former is not None and kwargs.get("position_bias") is None
        if shows and any(wanted(f"{name}.{kind}") for kind in BETWEEN):
            causal = attention_mask is None and is_causal(module, kwargs.get("is_causal"))
            scale = scale_of(query, kwargs.get("scaling"))
            context = _attended(*inputs, attention_mask, causal, scale, tapped_if_wanted)
        if context is None:
            context, *others = function(module, *inputs, attention_mask, *args, **kwargs)
        return tapped_if_wanted("context", context), *others

    ALL_ATTENTION_FUNCTIONS[implementation] = attend
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS[implementation]
        if ALL_ATTENTION_FUNCTIONS.get(implementation) is not former:  # an outer body has replaced it before
            ALL_ATTENTION_FUNCTIONS[implementation] = former


def _attended(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    tap: Callable[[str, Tensor], Tensor],
) -> Tensor | None:
    """The context [N, T, H, D], computed from tapped scores and probabilities; None where `tap` changes neither.

    For None the model computes its own context, so a tap that only reads does not change a bit.
    """
    key, value = (tensor.repeat_interleave(query.shape[1] // key.shape[1], 1) for tensor in (key, value))
    scores = query @ key.transpose(-1, -2) * scale
    seen = tap("scores", scores)
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros((), device=mask.device).masked_fill(~mask, -torch.inf)
    probabilities = (seen.float() + (0 if mask is None else mask)).softmax(-1).to(value.dtype)
    given = tap("probabilities", probabilities)
    if given is probabilities and seen is scores:
        return None
    return (given @ value).transpose(1, 2).contiguous()
