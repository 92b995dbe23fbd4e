"""Attention in causal pieces against the definition in float64; and torch's own wherever it must be left to that."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import Gemma2Config, MistralConfig

import tiny
from shardq.model import attention
from shardq.model.attention import NAME, PIECE_TOKENS, attend, causal_attention
from shardq.model.block import block_plans, run_block
from shardq.model.ends import prologue
from shardq.model.recorded import record_arguments
from shardq.model.skeleton import open_skeleton
from shardq.model.weights import stream_blocks

BF16, CPU = torch.bfloat16, torch.device("cpu")


def by_definition(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = query @ key.transpose(-1, -2) * scale
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(later, -torch.inf).softmax(-1) @ value


def random_qkv(tokens: int, dtype: torch.dtype, heads: int = 6, kv_heads: int = 2, value_size: int = 8) -> list[Tensor]:
    torch.manual_seed(tokens)
    sizes = ((heads, 16), (kv_heads, 16), (kv_heads, value_size))
    return [torch.randn(2, num, tokens, size, dtype=dtype, requires_grad=True) for num, size in sizes]


@pytest.mark.parametrize("tokens", [2, PIECE_TOKENS, PIECE_TOKENS + 1, 3 * PIECE_TOKENS - 5])
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_context_and_gradients_are_the_definitions(tokens: int, kv_heads: int):
    inputs = random_qkv(tokens, torch.float64, kv_heads=kv_heads)
    upstream = torch.randn(2, 6, tokens, 8, dtype=torch.float64)
    expected = by_definition(*inputs, 0.3)
    found = causal_attention(*inputs, 0.3)
    assert torch.allclose(found, expected, rtol=0, atol=2e-6)  # the softmax is in float32
    wanted = torch.autograd.grad(expected, inputs, upstream)
    for gradient, reference in zip(torch.autograd.grad(found, inputs, upstream), wanted, strict=True):
        assert torch.allclose(gradient, reference, rtol=0, atol=2e-5)


def test_bf16_is_nearly_as_exact_as_torchs_kernel():
    inputs = random_qkv(512, BF16, value_size=16)
    exact = by_definition(*(tensor.double() for tensor in inputs), 0.25)
    torchs = nn.functional.scaled_dot_product_attention(*inputs, is_causal=True, scale=0.25, enable_gqa=True)
    ours, theirs = (
        (context.double() - exact).square().mean().sqrt().item()
        for context in (causal_attention(*inputs, 0.25), torchs)
    )
    assert ours < 3 * theirs < 0.003  # scores are rounded to bf16, which torch's are not


@pytest.fixture(name="pieces")
def _pieces(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """The shapes of the queries that were attended to in pieces."""
    seen = []

    def counted(query: Tensor, *others: object) -> Tensor:
        seen.append(tuple(query.shape))
        return causal_attention(query, *others)

    monkeypatch.setattr(attention, "causal_attention", counted)
    return seen


@pytest.mark.parametrize(
    "case", ["float32", "mask", "not causal", "one token", "longer keys", "too long", "dropout"]
)  # fmt: skip
def test_everything_else_is_torchs(case: str, pieces: list):
    tokens = {"one token": 1, "too long": attention.MAX_TOKENS + 1}.get(case, 20)
    query, key, value = random_qkv(tokens, torch.float32 if case == "float32" else BF16, value_size=16)
    mask = torch.ones(1, 1, tokens, tokens, dtype=torch.bool).tril() if case == "mask" else None
    more = {"not causal": {"is_causal": False}, "dropout": {"dropout": 1e-9}}.get(case, {})
    query = query[:, :, :10] if case == "longer keys" else query
    module = nn.Module()
    module.num_key_value_groups = 3
    found, _ = attend(module, query, key, value, mask, **more)
    assert found.shape == (2, query.shape[2], 6, 16) and not pieces
    if case in ("float32", "mask"):
        expected = by_definition(query.double(), key.double(), value.double(), 0.25).transpose(1, 2)
        assert torch.allclose(found.double(), expected, atol=1e-5 if case == "float32" else 0.05)


def test_a_block_takes_pieces_in_bf16_alone_and_comes_out_the_same(tmp_path: Path, pieces: list):
    skeleton = open_skeleton(tiny.save_llama(tmp_path / "llama"))
    assert skeleton.model.config._attn_implementation == NAME
    with prologue(skeleton, CPU) as embed:
        call = record_arguments(skeleton, embed, 40)[0].bound(embed(torch.arange(80).view(2, 40)))
    block = next(iter(stream_blocks(skeleton, block_plans(skeleton), CPU))).module
    in_float32 = run_block(block, call, torch.float32)
    assert not pieces
    in_pieces = run_block(block, call, BF16)
    assert len(pieces) == 1 and pieces[0][2] == 40
    error = (in_pieces - in_float32).square().mean() / (in_float32 - call.hidden).square().mean()
    assert 0 < error < 1e-3


@pytest.mark.parametrize("kind", ["eager", "sliding"])
def test_masks_that_are_more_than_causal_are_kept(kind: str, tmp_path: Path, pieces: list):
    shape = dict(num_hidden_layers=2, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, vocab_size=64,
                 intermediate_size=64, head_dim=8)  # fmt: skip
    config = Gemma2Config(**shape) if kind == "eager" else MistralConfig(**shape, sliding_window=7)
    skeleton = open_skeleton(tiny.save_model(tmp_path, config))
    assert skeleton.model.config._attn_implementation == ("eager" if kind == "eager" else NAME)
    with prologue(skeleton, CPU) as embed:
        call = record_arguments(skeleton, embed, 20)[0].bound(embed(torch.arange(20)[None]))
    block = next(iter(stream_blocks(skeleton, block_plans(skeleton), CPU))).module
    run_block(block, call, BF16)
    assert not pieces
