"""Activations inside blocks, seen and replaced, against hooks of the tests' own on whole models of transformers."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Gemma2Config,
    GPTNeoXConfig,
    MistralConfig,
    OPTConfig,
    PretrainedConfig,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import tiny
from shardq.model.arguments import BlockArguments
from shardq.model.attention import NAME
from shardq.model.block import block_plans
from shardq.model.ends import prologue
from shardq.model.recorded import record_arguments
from shardq.model.skeleton import Skeleton, open_skeleton
from shardq.model.taps import activation_names, tapped
from shardq.model.weights import stream_blocks

TOKENS = torch.arange(3, 35).view(2, 16)
LLAMA = """input input_layernorm.input input_layernorm.output
self_attn.q_proj.input self_attn.q_proj.output self_attn.k_proj.input self_attn.k_proj.output
self_attn.v_proj.input self_attn.v_proj.output self_attn.query self_attn.key self_attn.value self_attn.scores
self_attn.probabilities self_attn.context
self_attn.o_proj.input self_attn.o_proj.output post_attention_layernorm.input post_attention_layernorm.output
mlp.gate_proj.input mlp.gate_proj.output mlp.act_fn.input mlp.act_fn.output mlp.up_proj.input mlp.up_proj.output
mlp.down_proj.input mlp.down_proj.output output""".split()
SMALL = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 64}
OTHERS = {
    "eager": Gemma2Config(**SMALL, intermediate_size=64, num_key_value_heads=2, head_dim=8, bos_token_id=1),
    "fused": GPTNeoXConfig(**SMALL, intermediate_size=64, bos_token_id=1, eos_token_id=2),
    "biases": OPTConfig(**SMALL, ffn_dim=64, word_embed_proj_dim=32),
}


def opened(folder: Path) -> tuple[Skeleton, list[BlockArguments], Tensor]:
    """A model, what it passes its blocks for 16 tokens, and the hidden states that enter the first."""
    skeleton = open_skeleton(folder)
    with prologue(skeleton, torch.device("cpu")) as embed:
        return skeleton, record_arguments(skeleton, embed, 16), embed(TOKENS)


def first_block(skeleton: Skeleton) -> torch.nn.Module:
    return next(iter(stream_blocks(skeleton, block_plans(skeleton), torch.device("cpu")))).module


def run(block: torch.nn.Module, hidden: Tensor, arguments: BlockArguments) -> Tensor:
    with torch.no_grad():
        output = block(hidden, *arguments.args, **arguments.kwargs)
    return output[0] if isinstance(output, tuple) else output


def seen_in(block: torch.nn.Module, hidden: Tensor, arguments: BlockArguments, wanted: Callable) -> dict[str, Tensor]:
    seen = {}
    with tapped(block, lambda name, values: seen.setdefault(name, values), wanted):
        run(block, hidden, arguments)
    return seen


def hooks_of(block: torch.nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in block.modules())


def test_names_are_those_of_the_blocks_modules_in_the_order_of_its_code(llama: Path):
    skeleton, arguments, _ = opened(llama)
    assert activation_names(skeleton.blocks[0], arguments[0], (1, 16, 64)) == LLAMA
    assert hooks_of(skeleton.blocks[0]) == 0


def test_what_is_seen_is_what_the_model_computes(llama: Path):
    skeleton, arguments, hidden = opened(llama)
    seen = seen_in(first_block(skeleton), hidden, arguments[0], lambda name: True)
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    layer, expected = model.model.layers[0], {}
    for name, module in layer.named_modules():
        module.register_forward_hook(
            lambda module, inputs, output, name=name: expected.update(
                {f"{name}.input": inputs[0] if inputs else None, f"{name}.output": output}
            )
        )
    with torch.no_grad():
        model(TOKENS)
    expected |= {"input": expected[".input"], "output": expected[".output"], "self_attn.context": None}
    query, key, value = (
        expected[f"self_attn.{which}_proj.output"].view(2, 16, -1, 16).transpose(1, 2) for which in "qkv"
    )
    expected["self_attn.value"] = value
    assert torch.equal(seen["self_attn.context"].flatten(2), seen["self_attn.o_proj.input"])
    # Turned by their positions: lengths of pairs stay.
    for name, flat in (("query", query), ("key", key)):
        pairs = [tensor.unflatten(-1, (2, 8)).norm(dim=-2) for tensor in (seen[f"self_attn.{name}"], flat)]
        torch.testing.assert_close(*pairs)
    assert list(seen) == LLAMA
    for name in set(LLAMA) - {f"self_attn.{kind}" for kind in ("query", "key", "context", "scores", "probabilities")}:
        torch.testing.assert_close(seen[name], expected[name], msg=name)


def test_scores_and_probabilities_are_those_of_eager_attention(llama: Path):
    skeleton, arguments, hidden = opened(llama)
    block = first_block(skeleton)
    seen = seen_in(block, hidden, arguments[0], lambda name: True)
    eager = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        probabilities = eager(TOKENS, output_attentions=True).attentions[0]
    torch.testing.assert_close(seen["self_attn.probabilities"], probabilities)
    allowed = torch.ones(16, 16, dtype=torch.bool).tril()
    scores = seen["self_attn.scores"]
    assert scores.isfinite().all() and scores.shape == probabilities.shape
    torch.testing.assert_close(scores.masked_fill(~allowed, -torch.inf).softmax(-1), probabilities)
    with tapped(block, lambda name, values: values + 0, {"self_attn.scores"}.__contains__):
        by_products = run(block, hidden, arguments[0])
    torch.testing.assert_close(by_products, run(block, hidden, arguments[0]))


def test_masks_hold_where_scores_are_changed(tmp_path: Path):
    config = MistralConfig(**SMALL, intermediate_size=64, num_key_value_heads=2, sliding_window=5)
    skeleton, arguments, hidden = opened(tiny.save_model(tmp_path, config))
    block = first_block(skeleton)
    with tapped(block, lambda name, values: values + 0, {"self_attn.scores"}.__contains__):
        by_products = run(block, hidden, arguments[0])
    torch.testing.assert_close(by_products, run(block, hidden, arguments[0]))
    seen = seen_in(block, hidden, arguments[0], {"self_attn.probabilities"}.__contains__)["self_attn.probabilities"]
    assert torch.equal(seen[0, 0] > 0, torch.ones(16, 16, dtype=torch.bool).tril().triu(-4))


@pytest.mark.parametrize("kind", OTHERS)
def test_other_architectures_show_attention_too(kind: str, tmp_path: Path):
    skeleton, arguments, hidden = opened(tiny.save_model(tmp_path, OTHERS[kind]))
    names = activation_names(skeleton.blocks[0], arguments[0], (1, 16, 32))
    block = first_block(skeleton)
    seen = seen_in(block, hidden, arguments[0], lambda name: True)
    assert list(seen) == names
    attention = [name for name in names if name.endswith((".query", ".key", ".value", ".context"))]
    assert len(attention) == 4
    untouched, zeroed = run(block, hidden, arguments[0]), {}
    for name in attention:
        with tapped(block, lambda name, values: torch.zeros_like(values), {name}.__contains__):
            zeroed[name] = run(block, hidden, arguments[0])
    assert all(not torch.allclose(output, untouched) for output in zeroed.values())


def test_attention_of_a_models_own_code_is_not_seen(tmp_path: Path):
    config: PretrainedConfig = FalconConfig(**SMALL)
    skeleton, arguments, _ = opened(tiny.save_model(tmp_path, config))
    names = activation_names(skeleton.blocks[0], arguments[0], (1, 16, 32))
    assert "mlp.dense_h_to_4h.input" in names and not any(name.endswith(".key") for name in names)


def test_what_the_tap_gives_goes_on(llama: Path):
    skeleton, arguments, hidden = opened(llama)
    block = first_block(skeleton)
    reference = run(block, hidden, arguments[0])
    for name in LLAMA:
        called = []

        def change(name: str, values: Tensor, called: list = called) -> Tensor:
            called.append(name)
            return values * 1.5 + 0.5

        with tapped(block, change, {name}.__contains__):
            changed = run(block, hidden, arguments[0])
        assert called == [name]
        assert not torch.allclose(changed, reference)
        assert torch.equal(run(block, hidden, arguments[0]), reference)


def test_nothing_is_left_behind_by_nested_or_failing_bodies(llama: Path):
    skeleton, arguments, hidden = opened(llama)
    block, former = first_block(skeleton), ALL_ATTENTION_FUNCTIONS[NAME]
    reference = run(block, hidden, arguments[0])
    outer, inner = [], []

    def noting(notes: list) -> Callable:
        return lambda name, values: notes.append(name) or values

    with tapped(block, noting(outer), {"self_attn.key"}.__contains__):
        with tapped(block, noting(inner), {"self_attn.key"}.__contains__):
            assert torch.equal(run(block, hidden, arguments[0]), reference)
        run(block, hidden, arguments[0])
    assert (len(outer), len(inner)) == (2, 1)
    with pytest.raises(RuntimeError, match="on purpose"):
        with tapped(block, noting([])):
            raise RuntimeError("on purpose")
    assert hooks_of(block) == 0 and ALL_ATTENTION_FUNCTIONS[NAME] is former
    assert NAME not in ALL_ATTENTION_FUNCTIONS._local_mapping
