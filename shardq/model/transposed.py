"""Linears whose weight is stored [I, O], as `Conv1D` of GPT-2 and its kin keeps it, become linears like all others."""

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from shardq.model.experts import FusedView


def adapt_transposed(model: nn.Module) -> dict[str, FusedView]:
    """Replace every `Conv1D` in a model on the meta device by an `nn.Linear`.

    Returns:
        for each new weight, by its name in the model, its place in the one of the same name that it replaces.
    """
    views: dict[str, FusedView] = {}
    for path, module in list(model.named_modules()):
        if not isinstance(module, Conv1D):
            continue
        made = nn.Linear(module.nx, module.nf, device="meta", dtype=module.weight.dtype)
        model.set_submodule(path, made.requires_grad_(module.weight.requires_grad).train(module.training))
        name = f"{path}.weight"
        views[name] = FusedView(fused=name, shape=tuple(module.weight.shape), of=Tensor.t)
    return views
