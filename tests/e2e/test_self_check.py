"""The stream's blocks against transformers' own forward: a stream that computes something else is stopped by name."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma3nTextConfig,
    GlmMoeDsaConfig,
    LlamaConfig,
    Qwen3MoeConfig,
    SmolLM3Config,
)

import shardq.training.self_check as self_check_module
import tiny
from runs import ONE_RANK, run_evaluate, run_quantize
from shardq.cache.store import MemoryStore
from shardq.commands import evaluate
from shardq.errors import Stopped, UnsupportedModelError
from shardq.model import weights
from shardq.model.arguments import BlockArguments
from shardq.model.block import BlockPlan, block_plans
from shardq.model.ends import prologue
from shardq.model.handed import Handed
from shardq.model.recorded import record_arguments
from shardq.model.skeleton import Skeleton, open_skeleton
from shardq.model.weights import stream_blocks
from shardq.rundir.plan import Plan
from shardq.training.passes import Activations, Forward, advance, embed_samples
from shardq.training.self_check import self_check

CPU = torch.device("cpu")
ROTATING_SOME = SmolLM3Config(
    vocab_size=211, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, no_rope_layers=[1, 0, 1], initializer_range=0.2, pad_token_id=0, bos_token_id=1,
    eos_token_id=2,
)  # fmt: skip


@pytest.fixture(scope="module", name="gemma4")
def _gemma4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("gemma4"), tiny.GEMMA4)


@pytest.fixture(scope="module", name="tokens")
def _tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 samples of 64 tokens: more than go through a block at once."""
    path = tmp_path_factory.mktemp("tokens") / "tokens.safetensors"
    save_file({"tokens": torch.randint(3, 200, (24, 64), generator=torch.Generator().manual_seed(0))}, path)
    return path


def whole_model_perplexity(folder: Path, tokens_NT: Tensor) -> float:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        losses = [model(tokens_T[None], labels=tokens_T[None]).loss for tokens_T in tokens_NT]
    return torch.stack(losses).mean().exp().item()


# Blocks that are passed more than hidden states from earlier ones: a mapping with keys and values; that, and four
# lanes; the tokens that the block before chose.
HANDING_ON = {
    "gemma4": tiny.GEMMA4,
    "gemma3n": Gemma3nTextConfig(
        vocab_size=211, vocab_size_per_layer_input=211, hidden_size=48, intermediate_size=[80] * 5,
        num_hidden_layers=5, num_attention_heads=4, num_key_value_heads=2, head_dim=12, sliding_window=7,
        layer_types=["sliding_attention", "full_attention"] * 2 + ["sliding_attention"], num_kv_shared_layers=2,
        hidden_size_per_layer_input=8, laurel_rank=4, activation_sparsity_pattern=[0.5] + [0.0] * 4,
        initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    ),
    "glm_moe_dsa": GlmMoeDsaConfig(
        vocab_size=211, hidden_size=48, intermediate_size=80, num_hidden_layers=5, num_attention_heads=4,
        num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=12,
        mlp_layer_types=["dense"] * 5, indexer_types=["full", "shared", "full", "shared", "shared"], index_topk=16,
        index_head_dim=16, index_n_heads=2, initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "name", ["gemma4", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gemma3n", "glm_moe_dsa"))]
)
def test_a_run_of_blocks_that_hand_tensors_on_is_the_whole_models_also_when_it_is_resumed(
    name: str, tokens: Path, tmp_path: Path
):
    model, tokens_NT = tiny.save_model(tmp_path / "model", HANDING_ON[name]), load_file(tokens)["tokens"]
    few = ("--optimize.iterations", 1, "--calib.samples", 17)
    found = run_evaluate(model, tokens)["perplexity"]
    assert found == pytest.approx(whole_model_perplexity(model, tokens_NT), rel=1e-5)
    run_quantize(model, tokens, tmp_path / "straight", *few)
    with pytest.raises(Stopped):
        run_quantize(model, tokens, tmp_path / "resumed", *few, stop_after=3)
    run_quantize(model, tokens, tmp_path / "resumed", *few)
    of_memory = (*few, "--cache.placement", "cpu")
    with pytest.raises(Stopped):
        run_quantize(model, tokens, tmp_path / "replayed", *of_memory, stop_after=3)
    run_quantize(model, tokens, tmp_path / "replayed", *of_memory)
    files = [
        {path.name: path.read_bytes() for path in sorted((tmp_path / name / "blocks").iterdir())}
        for name in ("straight", "resumed", "replayed")
    ]
    assert files[0] == files[1] == files[2]
    found = run_evaluate(tmp_path / "straight", tokens)["perplexity"]
    assert found == pytest.approx(whole_model_perplexity(tmp_path / "straight", tokens_NT), rel=1e-5)


def recorded_as_if_for_all(skeleton, embed, length: int) -> list[BlockArguments]:
    """What one sample is passed, taken for what all are."""
    found = record_arguments(skeleton, embed, length)
    return [
        BlockArguments(passed.index, passed.args, passed.kwargs, passed.width, shared=passed.shared) for passed in found
    ]


def test_arguments_of_another_sample_stop_the_run_and_are_named(
    gemma4: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(evaluate, "record_arguments", recorded_as_if_for_all)
    with pytest.raises(UnsupportedModelError) as caught:
        run_evaluate(gemma4, tokens)
    message = str(caught.value)
    assert "Gemma4ForCausalLM: model.layers.0: its output is not that of transformers' own forward" in message
    assert "arguments that differ: per_layer_input" in message and "sample 0" in message and "\n" not in message
    assert run_evaluate(gemma4, tokens, "--self_check", "false")["perplexity"] > 1


def test_a_value_of_an_earlier_block_that_is_another_samples_stops_the_run(
    tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model = tiny.save_model(tmp_path / "model", HANDING_ON["glm_moe_dsa"])
    own_tensor = Handed.of
    monkeypatch.setattr(Handed, "of", lambda handed, returned, num: own_tensor(handed, returned, num).roll(1, 0))
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.1: its output .*differ: prev_topk_indices"):
        run_evaluate(model, tokens)


def test_a_block_that_is_not_the_one_at_hand_stops_the_run(tmp_path: Path, tokens: Path, monkeypatch):
    folder = tiny.save_model(tmp_path / "model", ROTATING_SOME)
    assert run_evaluate(folder, tokens)["perplexity"] > 1
    # The module that blocks share goes on rotating queries and keys, as the first does.
    monkeypatch.setattr(weights, "_carry_attributes", lambda block, slot: None)
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.1: its output is not that"):
        run_evaluate(folder, tokens)


def planned(skeleton: Skeleton, arguments: list[BlockArguments]) -> list[BlockPlan]:
    """Blocks with what the model passes them."""
    return Plan(blocks=block_plans(skeleton), rest=[]).with_arguments(arguments).blocks


def checked(folder: Path, dtype: torch.dtype, disturb: float = 0.0, length: int = 24, num_tokens: int = 1 << 20) -> int:
    """Stream a model; a block's output may be disturbed by a share of what it adds. Gives the blocks checked."""
    skeleton, done = open_skeleton(folder), 0
    tokens_NT = torch.randint(3, 200, (3, length), generator=torch.Generator().manual_seed(1))
    activations = Activations(MemoryStore(), range(3), length, CPU)
    with prologue(skeleton, CPU) as embed:
        activations = replace(activations, blocks=planned(skeleton, record_arguments(skeleton, embed, length)))
        embed_samples(activations, tokens_NT, skeleton, embed)
    with self_check(skeleton, tokens_NT, activations, ONE_RANK, dtype, num_tokens) as check:
        for loaded in stream_blocks(skeleton, activations.blocks, CPU, dtype):
            advance(activations, "fp", loaded.index, partial(disturbed, loaded, disturb))
            check(loaded)
            done += 1
    return done


def disturbed(forward: Forward, share: float, hidden_NTD: Tensor) -> Tensor:
    output_NTD = forward(hidden_NTD)
    return output_NTD + share * (output_NTD - hidden_NTD)


@pytest.mark.parametrize(
    "dtype, allowed, too_much", [(torch.float32, 1e-4, 0.01), (torch.bfloat16, 0.01, 0.3)], ids=str
)
def test_rounding_passes_and_more_does_not(llama: Path, dtype: torch.dtype, allowed: float, too_much: float):
    assert checked(llama, dtype) == checked(llama, dtype, allowed) == 3
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.0: its output .* tokens differ"):
        checked(llama, dtype, too_much)


def test_choices_of_routers_that_rounding_changes_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = Qwen3MoeConfig(
        vocab_size=211, hidden_size=48, moe_intermediate_size=32, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=12, num_experts=16, num_experts_per_tok=4, initializer_range=0.2,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = tiny.save_model(tmp_path, config)
    assert checked(model, torch.bfloat16) == 3
    with pytest.raises(UnsupportedModelError, match="48 of 48 tokens differ"):
        checked(model, torch.bfloat16, 0.3)
    monkeypatch.setattr(self_check_module, "OFF_ROUTED", 0.0)
    with pytest.raises(UnsupportedModelError, match="1 of 48 tokens differ"):
        checked(model, torch.bfloat16)


def test_few_tokens_are_checked_where_few_are_computed_and_whole_samples_decide(tmp_path: Path):
    # Position embeddings of long samples are others than those of short ones.
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    shape = dict(vocab_size=211, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
                 initializer_range=0.2, max_position_embeddings=24)  # fmt: skip
    folder = tiny.save_model(tmp_path / "dynamic", LlamaConfig(**shape, rope_parameters=rope))
    assert checked(folder, torch.float32, length=40, num_tokens=200) == 3
    with pytest.raises(UnsupportedModelError, match="not that of transformers' own"):
        checked(folder, torch.float32, 0.01, length=40, num_tokens=200)


def test_hidden_states_that_do_not_come_from_the_block_before_stop_the_run(llama: Path):
    store = MemoryStore()
    skeleton, tokens_NT = open_skeleton(llama), torch.randint(3, 100, (2, 16))
    activations = Activations(store, range(2), 16, CPU)
    with prologue(skeleton, CPU) as embed:
        activations = replace(activations, blocks=planned(skeleton, record_arguments(skeleton, embed, 16)))
        embed_samples(activations, tokens_NT, skeleton, embed)
    with (
        pytest.raises(UnsupportedModelError, match=r"model\.layers\.1: what enters it is not that"),
        self_check(skeleton, tokens_NT, activations, ONE_RANK, torch.float32, 1 << 20) as check,
    ):
        for loaded in stream_blocks(skeleton, activations.blocks, CPU):
            if loaded.index == 1:  # as if another pass had written there
                for sample in range(2):
                    store.write("fp", 1, sample, store.read("fp", 1, sample) * 1.5)
            advance(activations, "fp", loaded.index, loaded)
            check(loaded)


def test_the_check_takes_a_small_share_of_a_run_and_can_be_left_out(
    llama: Path, token_file: Path, tmp_path: Path, capsys
):
    run_quantize(llama, token_file, tmp_path / "checked", "--optimize.iterations", 2)
    assert "self_check" not in capsys.readouterr().out
    run_quantize(llama, token_file, tmp_path / "unchecked", "--optimize.iterations", 2, "--self_check", "false")
    assert "self_check: off" in capsys.readouterr().out
    blocks = [sorted(path.read_bytes() for path in (tmp_path / name / "blocks").iterdir())
              for name in ("checked", "unchecked")]  # fmt: skip
    assert blocks[0] == blocks[1]
    spans = [json.loads(line) for line in (tmp_path / "checked" / "events.jsonl").read_text().splitlines()]
    assert [span["block"] for span in spans if span["span"] == "self-check"] == [0, 1, 2]
