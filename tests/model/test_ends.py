"""Streaming a model block by block gives the logits of the whole model in transformers."""

import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

import tiny
from shardq.model.ends import BlockArguments, block_forward, epilogue, prologue, record_arguments
from shardq.model.skeleton import Skeleton, open_skeleton
from shardq.model.weights import stream_blocks

CPU = torch.device("cpu")
VOCAB, LENGTH, WINDOW = 211, 24, 7

SHAPE = {
    "vocab_size": VOCAB, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GATED = SHAPE | {"intermediate_size": 80, "num_key_value_heads": 2, "initializer_range": 0.2}
ALTERNATING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
# 48 channels: their square root, by which Gemma scales its embeddings, is not exact in bfloat16.
GEMMA = GATED | ALTERNATING | {"head_dim": 12}
NEOX = SHAPE | {"intermediate_size": 80, "initializer_range": 0.2}
LLAMA = LlamaConfig(**GATED, tie_word_embeddings=True)

ARCHITECTURES: dict[str, PretrainedConfig] = {
    "llama-untied": LlamaConfig(**GATED, tie_word_embeddings=False),
    "llama-scaled-rope": LlamaConfig(
        **GATED, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    ),
    "mistral-sliding": MistralConfig(**GATED, sliding_window=WINDOW),
    "gemma2": Gemma2Config(**GEMMA),
    "gemma3": Gemma3TextConfig(**GEMMA),
    "qwen2-biases": Qwen2Config(**GATED),
    "qwen2-sliding": Qwen2Config(**GATED, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1),
    "qwen3": Qwen3Config(**GATED, head_dim=12),
    "phi3": Phi3Config(**GATED),
    "opt": OPTConfig(**SHAPE, ffn_dim=80, word_embed_proj_dim=48, init_std=0.2),
    "opt-projected": OPTConfig(**SHAPE, ffn_dim=80, word_embed_proj_dim=32, init_std=0.2, do_layer_norm_before=False),
    "gpt-neox": GPTNeoXConfig(**NEOX),
    "gpt-neox-sequential": GPTNeoXConfig(**NEOX, use_parallel_residual=False),
}


def random_tokens(num: int) -> Tensor:
    """Token ids [num, LENGTH] without special ones, all longer than the sliding window."""
    return torch.randint(3, VOCAB, (num, LENGTH), generator=torch.Generator().manual_seed(num))


def whole_model_logits(folder: Path, tokens_NT: Tensor) -> Tensor:
    """The reference: the model as transformers loads and runs it."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(input_ids=tokens_NT, use_cache=False).logits


@torch.no_grad()
def streamed_hidden(skeleton: Skeleton, tokens_NT: Tensor) -> Tensor:
    """Hidden states after the last block, one block in memory at a time."""
    with prologue(skeleton, CPU) as embed:
        arguments = record_arguments(skeleton, embed, tokens_NT.shape[1])
        hidden_NTD = embed(tokens_NT)
    for block_index, block in stream_blocks(skeleton, range(len(skeleton.blocks)), CPU):
        hidden_NTD = block_forward(block, arguments[block_index])(hidden_NTD)
    return hidden_NTD


def streamed_logits(folder: Path, tokens_NT: Tensor) -> Tensor:
    """What is tested: prologue, blocks, epilogue."""
    skeleton = open_skeleton(folder)
    hidden_NTD = streamed_hidden(skeleton, tokens_NT)
    with epilogue(skeleton, CPU) as to_logits:
        return to_logits(hidden_NTD)


def assert_streams_exactly(folder: Path) -> None:
    """Compare both ways for one sequence and for several."""
    assert len(list(folder.glob("*.safetensors"))) > 2, "the test needs several shards"
    for num in (1, 3):
        tokens_NT = random_tokens(num)
        expected = whole_model_logits(folder, tokens_NT)
        assert expected.std() > 0.05, "logits too flat to compare"
        torch.testing.assert_close(streamed_logits(folder, tokens_NT), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_streamed_logits_are_those_of_the_whole_model(tmp_path: Path, name: str):
    assert_streams_exactly(tiny.save_model(tmp_path, ARCHITECTURES[name], max_shard_size="20KB"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_every_source_dtype_is_computed_in_float32(tmp_path: Path, dtype: torch.dtype):
    assert_streams_exactly(tiny.save_model(tmp_path, LLAMA, dtype=dtype, max_shard_size="20KB"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with its own head, for what does not depend on the architecture."""
    return tiny.save_model(tmp_path_factory.mktemp("model"), ARCHITECTURES["llama-untied"], max_shard_size="20KB")


def test_logits_of_any_slice_of_positions_are_those_of_the_whole(folder: Path):
    skeleton = open_skeleton(folder)
    hidden_NTD = streamed_hidden(skeleton, random_tokens(2))
    with epilogue(skeleton, CPU) as to_logits:
        whole, some, one = to_logits(hidden_NTD), to_logits(hidden_NTD[:, 5:9]), to_logits(hidden_NTD[1:, -1:])
    torch.testing.assert_close(some, whole[:, 5:9])
    torch.testing.assert_close(one, whole[1:, -1:])


@pytest.mark.parametrize("end", [prologue, epilogue])
def test_end_is_in_memory_only_while_it_is_used(folder: Path, end: Callable):
    skeleton = open_skeleton(folder)
    with end(skeleton, CPU):
        assert not skeleton.model.model.norm.weight.is_meta
    assert all(tensor.is_meta for tensor in [*skeleton.model.parameters(), *skeleton.model.buffers()])


def test_embedded_hidden_states_are_let_go_after_the_prologue(folder: Path):
    with prologue(open_skeleton(folder), CPU) as embed:
        hidden_NTD = embed(random_tokens(2))
        kept = weakref.ref(hidden_NTD)
        del hidden_NTD
    assert kept() is None


def test_final_hidden_states_are_let_go_after_the_epilogue(folder: Path):
    hidden_NTD = torch.randn(1, LENGTH, 48)
    kept = weakref.ref(hidden_NTD)
    with epilogue(open_skeleton(folder), CPU) as to_logits:
        to_logits(hidden_NTD)
    del hidden_NTD
    assert kept() is None


def test_tokens_may_be_embedded_in_parts(folder: Path):
    tokens_NT = random_tokens(3)
    with prologue(open_skeleton(folder), CPU) as embed:
        assert torch.equal(torch.cat([embed(tokens_NT[:1]), embed(tokens_NT[1:])]), embed(tokens_NT))


def test_block_that_returns_more_than_hidden_states_gives_only_those():
    class Talkative(nn.Module):
        def forward(self, hidden: Tensor, factor: int) -> tuple[Tensor, str]:
            return hidden * factor, "attention weights"

    forward = block_forward(Talkative(), BlockArguments(args=(), kwargs={"factor": 3}))
    assert torch.equal(forward(torch.ones(1, 2, 3)), torch.full((1, 2, 3), 3.0))


def test_head_stored_beside_the_embedding_is_not_tied_although_the_config_says_so(tmp_path: Path):
    folder = tiny.save_model(tmp_path, LLAMA, max_shard_size="10MB")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = torch.randn_like(tensors["model.embed_tokens.weight"])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    tokens_NT = random_tokens(2)
    torch.testing.assert_close(
        streamed_logits(folder, tokens_NT), whole_model_logits(folder, tokens_NT), rtol=1e-5, atol=1e-5
    )
