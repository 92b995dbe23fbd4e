"""Routed experts: a module of fused weights [E, ...] becomes one of numbered experts with linears of their own.

The layout is read from the flags that transformers' decorator `use_experts_implementation` leaves on the module, so
hooks, quantizers and exports see linears, whatever the family. The router stays as it is.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from shardq.errors import UnsupportedModelError
from shardq.model.stacked import split_stacks
from shardq.model.transformers_internals import ALL_EXPERTS_FUNCTIONS, gated, use_experts_function

NAME = "shardq_linears"
FLAGS = ("is_concatenated", "is_transposed", "has_bias", "has_gate", "has_post_expert_norm")


@dataclass(frozen=True, kw_only=True)
class FusedView:
    """The place of an expert's weight or bias in a fused parameter.

    Attributes:
        fused: the fused parameter's name in the model.
        shape: the fused parameter's shape.
        of: from a tensor of that shape to the part's view of it, in the form in which a linear has it.
    """

    fused: str
    shape: tuple[int, ...]
    of: Callable[[Tensor], Tensor]


def adapt_experts(model: nn.Module) -> dict[str, FusedView]:
    """Give every module of fused experts in a model on the meta device numbered experts, and have it compute with them.

    Expert N of the module has the linears `N.gate_proj`, `N.up_proj`, `N.down_proj`; without a gate, the last two.

    Returns:
        for each new parameter, by its name in the model, its place in the fused one that it replaces.

    Raises:
        UnsupportedModelError: a module's experts are fused in a form that it does not tell.
    """
    ALL_EXPERTS_FUNCTIONS.register(NAME, routed)
    views: dict[str, FusedView] = {}
    for path, module in list(model.named_modules()):
        if is_routed(module):
            _check(path, module)
            inside = _adapted(module)
            views.update((f"{path}.{name}".removeprefix("."), _under(path, view)) for name, view in inside.items())
            use_experts_function(module, NAME)
        elif "expert" in type(module).__name__.lower() and _matrices(module) and not isinstance(module, nn.Linear):
            if stacked := _stacked(path, module, model):
                views |= stacked
                continue
            missing = [flag for flag in FLAGS if not hasattr(module, flag)]
            raise UnsupportedModelError(
                f"{type(model).__name__}: {path} ({type(module).__name__}) has fused experts "
                f"({', '.join(_matrices(module))}) whose layout it does not tell ({', '.join(missing)}); such experts "
                "are not supported"
            )
    return views


def _stacked(path: str, module: nn.Module, model: nn.Module) -> dict[str, FusedView]:
    """The places of the weights of experts that a module multiplies with as one stack; nothing if it has none such."""
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters(recurse=False)}
    return {
        f"{path}.{name}": FusedView(fused=f"{path}.{stem}", shape=shapes[stem], of=of)
        for name, (stem, of) in split_stacks(module, model.config.get_text_config().hidden_size).items()
    }


def is_routed(module: nn.Module) -> bool:
    """Whether a module is of routed experts, each of which sees the tokens that a router chose for it."""
    return all(hasattr(module, flag) for flag in FLAGS)


def routed_in(block: nn.Module) -> dict[str, nn.Module]:
    """The modules of routed experts in a block, by name."""
    return {name: module for name, module in block.named_modules() if is_routed(module)}


@contextmanager
def answered(module: nn.Module, answer: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Iterator[None]:
    """In the body, a function of hidden states, experts' numbers and weights computes in a module of experts' place."""
    former = vars(module).get("forward")  # of an outer body
    module.forward = answer
    try:
        yield
    finally:
        if former is None:
            del module.forward
        else:
            module.forward = former


def routed(
    module: nn.Module,
    hidden_TD: Tensor,
    index_TK: Tensor,
    weight_TK: Tensor,
    some: Collection[int] | None = None,
    onto_TD: Tensor | None = None,
) -> Tensor:
    """Sum of the outputs [T, D] of the experts that a router chose for each token, times their weights.

    Args:
        index_TK: numbers of the experts; the number of experts itself stands for none.
        some: the experts that compute; the others add nothing (default: all).
        onto_TD: sum of the experts before these, which is changed in place (default: zeros).
    """
    output_TD = torch.zeros_like(hidden_TD) if onto_TD is None else onto_TD
    order_S, counts = index_TK.flatten().argsort(stable=True), counts_of(index_TK, module.num_experts)
    token_S, weight_S = order_S // index_TK.shape[-1], weight_TK.flatten()[order_S]
    num_kept = sum(counts)
    pieces = zip(token_S[:num_kept].split(counts), weight_S[:num_kept].split(counts), strict=True)
    for number, (token_S, weight_S) in enumerate(pieces):
        if (len(token_S) or hidden_TD.is_meta) and (some is None or number in some):
            expert = module.get_submodule(str(number))
            expert_SD = run_expert(module, expert, hidden_TD.index_select(0, token_S)) * weight_S[:, None]
            # A token chooses an expert once, so no two rows are added to the same one, in an order that varies.
            output_TD.index_add_(0, token_S, expert_SD.to(output_TD.dtype))
    return output_TD


def counts_of(index_TK: Tensor, num_experts: int) -> list[int]:
    """Tokens that each expert gets; on the meta device, where nothing is known of them, all get as many."""
    if index_TK.is_meta:
        return [(index_TK.numel() + number) // num_experts for number in range(num_experts)]
    return index_TK.flatten().bincount(minlength=num_experts)[:num_experts].tolist()


def run_expert(module: nn.Module, expert: nn.Module, hidden_SD: Tensor) -> Tensor:
    """Output [S, D] of one of a module's experts, or of one like them, before the router's weight."""
    if module.has_gate:
        parts = expert.gate_proj(hidden_SD), expert.up_proj(hidden_SD)
        inner_SI = gated(module, torch.cat(parts, -1) if module.is_concatenated else torch.stack(parts, -1).flatten(-2))
    else:
        inner_SI = module.act_fn(expert.up_proj(hidden_SD))
    output_SD = expert.down_proj(inner_SI)
    return module.post_expert_norm(output_SD) if module.has_post_expert_norm else output_SD


def _matrices(module: nn.Module) -> list[str]:
    return [name for name, parameter in module.named_parameters(recurse=False) if parameter.dim() > 1]


def _check(path: str, module: nn.Module) -> None:
    first = "gate_up_proj" if module.has_gate else "up_proj"
    names = {first, "down_proj"} | ({f"{first}_bias", "down_proj_bias"} if module.has_bias else set())
    found = {name for name, _ in module.named_parameters(recurse=False)}
    missing = sorted(names - found) + [name for name in ("num_experts", "config") if not hasattr(module, name)]
    if missing or found - names:
        wrong = f"lacks {', '.join(missing)}" if missing else f"has {', '.join(sorted(found - names))}, too"
        raise UnsupportedModelError(
            f"{path} ({type(module).__name__}) {wrong}: its experts are not of the form that its flags tell; such "
            "experts are not supported"
        )


def _adapted(module: nn.Module) -> dict[str, FusedView]:
    """Replace a module's fused parameters by numbered experts; the new parameters' places, by name within it."""
    fused = {name: parameter for name, parameter in module.named_parameters(recurse=False)}
    views: dict[str, FusedView] = {}
    for number in range(module.num_experts):
        expert = nn.Module()
        for linear, (stem, part) in _parts(module).items():
            of = partial(_part, number=number, part=part, concatenated=module.is_concatenated)
            places = {"weight": FusedView(fused=stem, shape=tuple(fused[stem].shape),
                                          of=partial(of, transposed=module.is_transposed))}  # fmt: skip
            if module.has_bias:
                bias = f"{stem}_bias"
                places["bias"] = FusedView(fused=bias, shape=tuple(fused[bias].shape), of=of)
            num_outputs, num_inputs = places["weight"].of(fused[stem]).shape
            made = nn.Linear(num_inputs, num_outputs, module.has_bias, device="meta", dtype=fused[stem].dtype)
            expert.add_module(linear, made.requires_grad_(fused[stem].requires_grad))
            views.update({f"{number}.{linear}.{name}": place for name, place in places.items()})
        module.add_module(str(number), expert.train(module.training))
    for name in fused:
        delattr(module, name)
    return views


def _parts(module: nn.Module) -> dict[str, tuple[str, int | None]]:
    """For each linear of an expert, the fused parameter, and which half of it: 0, 1, or None for all."""
    first = {"gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1)}
    return (first if module.has_gate else {"up_proj": ("up_proj", None)}) | {"down_proj": ("down_proj", None)}


def _part(fused: Tensor, number: int, part: int | None, concatenated: bool, transposed: bool = False) -> Tensor:
    """View of one expert's weight [O, I], or bias [O], in a fused parameter."""
    values = fused[number].t() if transposed else fused[number]
    if part is None:
        return values
    return values.chunk(2)[part] if concatenated else values[part::2]


def _under(path: str, view: FusedView) -> FusedView:
    return FusedView(fused=f"{path}.{view.fused}".removeprefix("."), shape=view.shape, of=view.of)
