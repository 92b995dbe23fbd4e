"""Causal attention on a CPU in bfloat16, in pieces; anything else is left to torch.

Transformers' models look their attention up by name. This one replaces torch's under the same name, `sdpa`, because
some models decide by the name how they compute.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "sdpa"
PIECE_TOKENS = 256
MAX_TOKENS = 1024  # with more tokens, a piece's scores do not fit the cache


def use_pieces() -> None:
    """Have models that call torch's attention through transformers' interface call `attend` from now on."""
    AttentionInterface.register(NAME, attend)


@contextmanager
def torchs_own() -> Iterator[None]:
    """Have models call torch's own attention, while the body runs."""
    ALL_ATTENTION_FUNCTIONS[NAME] = sdpa_attention_forward
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS[NAME]


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **others: object,
) -> tuple[Tensor, None]:
    """Context [N, T, H, D] of query [N, H, T, D], key and value [N, K, T, D], K dividing H; as transformers calls it.

    Torch's CPU kernel computes small products one by one. In bfloat16, products of larger pieces are 2 to 4 times as
    fast at 512 tokens, and they skip most of the scores that causality makes zero.
    """
    on_cpu, tokens = query.device.type == "cpu", query.shape[2]
    dtype = torch.get_autocast_dtype("cpu") if on_cpu and torch.is_autocast_enabled("cpu") else query.dtype
    fits = on_cpu and dtype == torch.bfloat16 and 1 < tokens == key.shape[2] <= MAX_TOKENS
    is_plain = attention_mask is None and not any(others.get(name) for name in ("dropout", "softcap"))
    is_plain = is_plain and others.get("position_bias") is None and is_causal(module, others.get("is_causal"))
    if not (fits and is_plain):
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **others)
    context = causal_attention(query.to(dtype), key.to(dtype), value.to(dtype), scale_of(query, scaling))
    return context.transpose(1, 2).contiguous(), None


def is_causal(module: nn.Module, asked: bool | None) -> bool:
    """Whether an attention module without a mask is causal: as its caller asks, or else as the module declares."""
    return getattr(module, "is_causal", True) if asked is None else asked


def scale_of(query: Tensor, scaling: float | None) -> float:
    """Factor of the scores."""
    return query.shape[-1] ** -0.5 if scaling is None else scaling


def causal_attention(query_NHTD: Tensor, key_NKTD: Tensor, value_NKTD: Tensor, scale: float) -> Tensor:
    """Softmax of `scale * query @ key^T` over the tokens up to each query's own, times value; [N, H, T, D].

    Consecutive query heads share a head of key and value. Products are in the inputs' dtype, softmax is in float32.
    """
    num, heads, tokens, _ = query_NHTD.shape
    kv_heads = key_NKTD.shape[1]
    query = query_NHTD.unflatten(1, (kv_heads, heads // kv_heads))
    key, value = key_NKTD.flatten(0, 1), value_NKTD.flatten(0, 1)
    pieces = []
    for start in range(0, tokens, PIECE_TOKENS):
        end = min(start + PIECE_TOKENS, tokens)
        # The heads that share a key are rows of one product.
        rows = query[:, :, :, start:end].reshape(num * kv_heads, -1, query.shape[-1])
        scores = torch.bmm(rows, key[:, :end].transpose(1, 2)).unflatten(1, (-1, end - start))
        places = torch.arange(end, device=scores.device)
        later = places > places[start:, None]
        weights = (scores.float() * scale).masked_fill(later, -torch.inf).softmax(-1).to(value.dtype)
        piece = torch.bmm(weights.flatten(1, 2), value[:, :end])
        pieces.append(piece.view(num, heads, end - start, -1))
    return torch.cat(pieces, 2)
