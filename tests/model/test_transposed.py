"""Linears that are stored [I, O]: the adapted model computes as transformers' own."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, OpenAIGPTConfig, PreTrainedConfig

from shardq.model.transposed import adapt_transposed

SIZES = {"vocab_size": 50, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 2}


@pytest.mark.parametrize("config", [GPT2Config(**SIZES), OpenAIGPTConfig(**SIZES)], ids=["gpt2", "openai-gpt"])
@torch.no_grad()
def test_the_adapted_model_computes_as_transformers_own(config: PreTrainedConfig):
    torch.manual_seed(0)
    own = AutoModelForCausalLM.from_config(config).eval()
    adapted = copy.deepcopy(own)
    views, stored = adapt_transposed(adapted), own.state_dict()
    assert len(views) == 8
    for name, view in views.items():
        assert view.fused == name and view.shape == tuple(stored[name].shape)
        stored[name] = view.of(stored[name])
    adapted.load_state_dict(stored, assign=True)
    tokens_NT = torch.arange(12).view(2, 6)
    torch.testing.assert_close(adapted(tokens_NT).logits, own(tokens_NT).logits)
