"""Streaming a model block by block gives the logits of the whole model in transformers."""

import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BioGptConfig,
    BloomConfig,
    ChameleonConfig,
    CodeGenConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3Config,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    Gemma4Config,
    Gemma4TextConfig,
    GlmMoeDsaConfig,
    GPTJConfig,
    GPTNeoConfig,
    GPTNeoXConfig,
    Idefics3Config,
    Llama4Config,
    Llama4TextConfig,
    LlamaConfig,
    MistralConfig,
    MllamaConfig,
    MllamaForConditionalGeneration,
    MptConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3VLConfig,
    XGLMConfig,
    xLSTMConfig,
)

import tiny
from shardq.errors import CheckpointError, UnsupportedModelError
from shardq.model import ends
from shardq.model.arguments import Call, hidden_of
from shardq.model.block import block_plans
from shardq.model.ends import epilogue, prologue
from shardq.model.hidden import hidden_in, lanes_of
from shardq.model.recorded import record_arguments
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
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip
MLA = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12,
    "num_key_value_heads": 4,
}  # fmt: skip
# 211 rows in slices of 50: four whole ones and a rest.
SLICE_ROWS = 50

ARCHITECTURES: dict[str, PretrainedConfig] = {
    "llama-untied": LlamaConfig(**GATED, tie_word_embeddings=False),
    "llama-scaled-rope": LlamaConfig(
        **GATED, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    ),
    "llama-late-padding": LlamaConfig(**GATED | {"pad_token_id": VOCAB - 1}),
    "mistral-sliding": MistralConfig(**GATED, sliding_window=WINDOW),
    "gemma2": Gemma2Config(**GEMMA),
    "gemma3": Gemma3TextConfig(**GEMMA),
    "gemma4-two-shapes": Gemma4TextConfig(
        **GATED | {"num_hidden_layers": 4}, head_dim=12, global_head_dim=24, hidden_size_per_layer_input=0,
        num_kv_shared_layers=0, sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"] * 2,
    ),
    "phi-head-bias": PhiConfig(**GATED),
    "qwen2-biases": Qwen2Config(**GATED),
    "qwen2-sliding": Qwen2Config(**GATED, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1),
    "qwen3": Qwen3Config(**GATED, head_dim=12),
    "phi3": Phi3Config(**GATED),
    "opt": OPTConfig(**SHAPE, ffn_dim=80, word_embed_proj_dim=48, init_std=0.2),
    "opt-projected": OPTConfig(**SHAPE, ffn_dim=80, word_embed_proj_dim=32, init_std=0.2, do_layer_norm_before=False),
    "gpt-neox": GPTNeoXConfig(**NEOX),
    "gpt-neox-sequential": GPTNeoXConfig(**NEOX, use_parallel_residual=False),
    # Models that expect a block to return a tuple.
    "gptj": GPTJConfig(**SHAPE, rotary_dim=8, initializer_range=0.2),
    "codegen": CodeGenConfig(**SHAPE, rotary_dim=8, initializer_range=0.2),
    "gpt-neo": GPTNeoConfig(**SHAPE, attention_types=[[["global", "local", "global"], 1]], window_size=WINDOW),
    "falcon": FalconConfig(**SHAPE, initializer_range=0.2),
    "mpt": MptConfig(**SHAPE),
    # Masks and biases that hold for one number of sequences.
    "bloom": BloomConfig(**SHAPE | {"initializer_range": 0.2}),
    "xglm": XGLMConfig(**SHAPE, ffn_dim=80, attention_heads=4, num_layers=3, d_model=48, init_std=0.2),
    # No `_no_split_modules`.
    "biogpt": BioGptConfig(**SHAPE, intermediate_size=80, initializer_range=0.2),
    # Blocks that return two values.
    "xlstm": xLSTMConfig(vocab_size=VOCAB, hidden_size=48, num_hidden_layers=2, num_heads=4),
    # `base_model_prefix` is that of the model with the vision tower.
    "llama4-dense": Llama4TextConfig(
        **GATED, intermediate_size_mlp=80, num_local_experts=2, moe_layers=[], interleave_moe_layer_step=0, head_dim=12
    ),
    # With vision towers, whose layers come first, and tied heads; the last with infinite buffers for sound.
    "gemma3-wrapper": Gemma3Config(text_config=GEMMA, vision_config=VISION, mm_tokens_per_image=1),
    "gemma4-wrapper": Gemma4Config(
        text_config=GEMMA | {
            "layer_types": ["sliding_attention", "full_attention", "full_attention"], "hidden_size_per_layer_input": 0,
            "num_kv_shared_layers": 0, "global_head_dim": 24,
        },
        vision_config=VISION | {"num_key_value_heads": 2, "head_dim": 16},
        audio_config={
            "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "subsampling_conv_channels": [8, 8],
            "output_proj_dims": 32,
        },
    ),
    # Each block is passed the tokens that the block before chose to attend to.
    "glm-dsa-dense": GlmMoeDsaConfig(
        **GATED | MLA, mlp_layer_types=["dense"] * 3, index_topk=4, index_head_dim=16, index_n_heads=2
    ),
    # Four lanes of hidden states, inputs of each block's own, keys and values of earlier blocks.
    "gemma3n": Gemma3nTextConfig(
        **GATED | {"intermediate_size": [80] * 4, "num_hidden_layers": 4}, head_dim=12,
        vocab_size_per_layer_input=VOCAB, hidden_size_per_layer_input=8, num_kv_shared_layers=2, laurel_rank=4,
        sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"] * 2,
        activation_sparsity_pattern=[0.5, 0.0, 0.0, 0.0],
    ),
    # Positions in three dimensions, of time, height and width; what the tower sees is added after blocks.
    "qwen3-vl-wrapper": Qwen3VLConfig(
        text_config=GATED | {
            "head_dim": 12, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 2, 2], "rope_theta": 1e4},
        },
        vision_config=VISION | {"depth": 2, "num_heads": 2, "out_hidden_size": 48, "deepstack_visual_indexes": [0]},
        tie_word_embeddings=False,
    ),
    # Its first tensor, whose device transformers takes for the model's, is the tower's.
    "idefics3-wrapper": Idefics3Config(text_config=GATED | {"model_type": "llama"}, vision_config=VISION),
    # Its head lies in the same part as the blocks.
    "llama4-wrapper": Llama4Config(
        text_config=GATED | {
            "intermediate_size_mlp": 80, "num_local_experts": 2, "moe_layers": [], "interleave_moe_layer_step": 0,
            "head_dim": 12,
        },
        vision_config=VISION | {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32},
    ),
    # As many positions as tokens, so that the two embeddings have equal shapes.
    "opt-positions-as-tokens": OPTConfig(
        **SHAPE | {"max_position_embeddings": VOCAB - 2}, ffn_dim=80, word_embed_proj_dim=48, init_std=0.2
    ),
}  # fmt: skip


def random_tokens(num: int) -> Tensor:
    """Token ids [num, LENGTH] without special ones, all longer than the sliding window."""
    return torch.randint(3, VOCAB, (num, LENGTH), generator=torch.Generator().manual_seed(num))


def whole_model_logits(folder: Path, tokens_NT: Tensor) -> Tensor:
    """The reference: the model as transformers loads and runs it."""
    with torch.no_grad():
        return tiny.whole_model(folder)(input_ids=tokens_NT, use_cache=False).logits


@torch.no_grad()
def streamed_hidden(skeleton: Skeleton, tokens_NT: Tensor) -> Tensor:
    """Hidden states after the last block, one block in memory at a time."""
    with prologue(skeleton, CPU) as embed:
        arguments = record_arguments(skeleton, embed, tokens_NT.shape[1])
        left = arguments[0].flat(embed(tokens_NT))
        calls = [Call(*stand_in.seen) for stand_in in skeleton.stand_ins]
        own = [passed.own_of(call) for passed, call in zip(arguments, calls, strict=True)]
    plans = [replace(plan, arguments=passed) for plan, passed in zip(block_plans(skeleton), arguments, strict=True)]
    for loaded in stream_blocks(skeleton, plans, CPU):
        left = loaded(loaded.plan.arguments.entering(left, own[loaded.index]))
    return hidden_of(left)


def logits_of(skeleton: Skeleton, hidden_NTD: Tensor) -> Tensor:
    """Logits of the whole vocabulary, its slices joined where each says that it begins."""
    logits_NTV = torch.full((*hidden_NTD.shape[:2], VOCAB), torch.nan)
    with epilogue(skeleton, CPU) as slices:
        for first, to_logits in slices:
            part_NTV = to_logits(hidden_NTD)
            logits_NTV[..., first : first + part_NTV.shape[2]] = part_NTV
    return logits_NTV


def streamed_logits(folder: Path, tokens_NT: Tensor) -> Tensor:
    """What is tested: prologue, blocks, epilogue."""
    skeleton = open_skeleton(folder)
    return logits_of(skeleton, streamed_hidden(skeleton, tokens_NT))


def use_slices(monkeypatch: pytest.MonkeyPatch, head_channels: int = 48) -> None:
    """Have the epilogue hold no more than SLICE_ROWS rows of a float32 head."""
    monkeypatch.setattr(ends, "HEAD_SLICE_BYTES", SLICE_ROWS * head_channels * 4)


def assert_streams_exactly(folder: Path) -> None:
    """Compare both ways for one sequence and for several."""
    assert len(list(folder.glob("*.safetensors"))) > 2, "the test needs several shards"
    for num in (1, 3):
        tokens_NT = random_tokens(num)
        expected = whole_model_logits(folder, tokens_NT)
        assert expected.std() > 0.05, "logits too flat to compare"
        torch.testing.assert_close(streamed_logits(folder, tokens_NT), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sliced", [False, True], ids=["whole-head", "sliced-head"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_streamed_logits_are_those_of_the_whole_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, sliced: bool
):
    config = ARCHITECTURES[name]
    if sliced:
        use_slices(monkeypatch, getattr(config, "word_embed_proj_dim", 48))
    assert_streams_exactly(tiny.save_model(tmp_path, config, max_shard_size="20KB"))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_whole_epilogue_and_its_gradient_are_the_whole_models(tmp_path: Path, name: str):
    folder = tiny.save_model(tmp_path, ARCHITECTURES[name], max_shard_size="20KB")
    model = tiny.whole_model(folder)
    kept = []
    skeleton, tokens_NT = open_skeleton(folder), random_tokens(2)
    last = model.get_submodule(skeleton.names[-1])
    last.register_forward_hook(lambda block, inputs, output: kept.append(output))
    expected_NTV = model(input_ids=tokens_NT, use_cache=False).logits
    hidden = hidden_in(kept[0])
    lanes = lanes_of(hidden, *tokens_NT.shape, "it")
    hidden_NTD = lanes.flat(hidden) if lanes else hidden
    along_NTV = torch.randn(expected_NTV.shape)
    (expected_gradient,) = torch.autograd.grad(expected_NTV, hidden, along_NTV)
    expected_gradient = lanes.flat(expected_gradient) if lanes else expected_gradient
    mine_NTD = hidden_NTD.detach().requires_grad_(True)
    with ends.whole_epilogue(skeleton, CPU, torch.float32) as of_tokens:
        to_logits, tokens_V = of_tokens(None), torch.tensor([5, 2, 40])
        to_some = of_tokens(tokens_V)
        some_NTV = to_some(mine_NTD)
        logits_NTV = to_logits(mine_NTD)
        pieces = [to_logits(piece) for piece in hidden_NTD.detach().split(LENGTH // 3, 1)]
    torch.testing.assert_close(logits_NTV, expected_NTV, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat(pieces, 1), expected_NTV, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(some_NTV, expected_NTV[..., tokens_V], rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(logits_NTV, mine_NTD, along_NTV, retain_graph=True)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-5)
    (of_some,) = torch.autograd.grad(some_NTV, mine_NTD, along_NTV[..., tokens_V])
    along_some_NTV = torch.zeros_like(along_NTV).index_copy(-1, tokens_V, along_NTV[..., tokens_V])
    (expected_of_some,) = torch.autograd.grad(logits_NTV, mine_NTD, along_some_NTV)
    torch.testing.assert_close(of_some, expected_of_some, rtol=1e-4, atol=1e-5)


def test_whole_epilogue_holds_and_multiplies_the_head_in_the_dtype_asked_for(folder: Path):
    skeleton = open_skeleton(folder)
    hidden_NTD = torch.randn(1, 5, 48)
    with ends.whole_epilogue(skeleton, CPU, torch.bfloat16) as of_tokens:
        assert of_tokens(None)(hidden_NTD).dtype == of_tokens([3, 1])(hidden_NTD).dtype == torch.bfloat16
        assert skeleton.model.get_output_embeddings().weight.dtype == torch.bfloat16
    assert all(parameter.is_meta for parameter in skeleton.model.parameters())
    assert all(stand_in.injected is None and stand_in.seen is None for stand_in in skeleton.stand_ins)


def test_blocks_that_tokens_alone_do_not_reach_are_refused(tmp_path: Path):
    config = MllamaConfig(
        text_config=GATED | {"cross_attention_layers": [1]},
        vision_config={
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_global_layers": 1,
            "attention_heads": 2, "image_size": 16, "patch_size": 8, "max_num_tiles": 1, "vision_output_dim": 64,
            "intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1]],
        },
    )  # fmt: skip
    MllamaForConditionalGeneration(config).save_pretrained(tmp_path)
    skeleton = open_skeleton(tmp_path)
    with prologue(skeleton, CPU) as embed, pytest.raises(UnsupportedModelError) as caught:
        record_arguments(skeleton, embed, LENGTH)
    name = "MllamaForConditionalGeneration: model.language_model.layers.1"
    assert f"{name} is not called where there are tokens alone" in str(caught.value)


def test_width_is_that_of_what_enters_a_block_not_the_embeddings(tmp_path: Path):
    skeleton = open_skeleton(tiny.save_model(tmp_path, ARCHITECTURES["opt-projected"]))
    with prologue(skeleton, CPU) as embed:
        assert {arguments.width for arguments in record_arguments(skeleton, embed, LENGTH)} == {48}
    assert skeleton.model.get_input_embeddings().embedding_dim == 32


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", [LlamaConfig, Gemma2Config, PhiConfig, OPTConfig, GPTNeoXConfig])
def test_head_tied_or_not_is_the_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type, tied: bool):
    own = {"ffn_dim": 80, "word_embed_proj_dim": 48, "init_std": 0.2} if kind is OPTConfig else GATED
    use_slices(monkeypatch)
    folder = tiny.save_model(tmp_path, kind(**SHAPE | own, tie_word_embeddings=tied), max_shard_size="20KB")
    head = AutoModelForCausalLM.from_pretrained(folder).get_output_embeddings()
    assert (head.bias is not None) == (kind is PhiConfig)
    assert_streams_exactly(folder)


@pytest.mark.parametrize("name", ["llama-untied", "gemma3", "gpt-neox", "opt", "opt-projected", "phi-head-bias"])
def test_prologue_gives_what_enters_the_first_block(tmp_path: Path, name: str):
    folder = tiny.save_model(tmp_path, ARCHITECTURES[name], max_shard_size="20KB")
    tokens_NT = random_tokens(2)
    model = tiny.whole_model(folder)
    with torch.no_grad():
        expected = model(tokens_NT, output_hidden_states=True).hidden_states[0]
    with prologue(open_skeleton(folder), CPU) as embed:
        assert torch.equal(embed(tokens_NT), expected)


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
    whole = logits_of(skeleton, hidden_NTD)
    torch.testing.assert_close(logits_of(skeleton, hidden_NTD[:, 5:9]), whole[:, 5:9])
    torch.testing.assert_close(logits_of(skeleton, hidden_NTD[1:, -1:]), whole[1:, -1:])


def test_slices_cover_the_vocabulary_in_order(folder: Path, monkeypatch: pytest.MonkeyPatch):
    use_slices(monkeypatch)
    with epilogue(open_skeleton(folder), CPU) as slices:
        found = [(first, to_logits(torch.zeros(1, 1, 48)).shape[2]) for first, to_logits in slices]
    assert found == [(0, 50), (50, 50), (100, 50), (150, 50), (200, 11)]


def test_no_more_than_a_slice_of_the_head_is_in_memory(folder: Path, monkeypatch: pytest.MonkeyPatch):
    use_slices(monkeypatch)
    skeleton = open_skeleton(folder)
    with epilogue(skeleton, CPU) as slices:
        for _ in slices:
            tables = (skeleton.model.lm_head.weight, skeleton.model.model.embed_tokens.weight)
            assert sum(table.untyped_storage().nbytes() for table in tables) <= (SLICE_ROWS + 1) * 48 * 4


def test_slices_of_a_head_whose_logits_are_masked_by_token_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Chameleon gives tokens of images the lowest logit."""
    codes = {"embed_dim": 16, "num_embeddings": 8, "latent_channels": 16, "resolution": 16, "base_channels": 32,
             "channel_multiplier": [1], "num_res_blocks": 1}  # fmt: skip
    images = {"<image>": 100} | {f"IMGIMG{letter}Z": 101 + number for number, letter in enumerate("ABCDEFGH")}
    folder = tiny.save_model(tmp_path, ChameleonConfig(**GATED, vq_config=codes, vocabulary_map=images))
    expected = whole_model_logits(folder, random_tokens(2))
    torch.testing.assert_close(streamed_logits(folder, random_tokens(2)), expected, rtol=1e-5, atol=1e-5)
    use_slices(monkeypatch)
    with pytest.raises(UnsupportedModelError, match="what follows its head changes the logits of some tokens only"):
        streamed_logits(folder, random_tokens(2))


def test_slice_may_be_a_single_token(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ends, "HEAD_SLICE_BYTES", 1)
    with epilogue(open_skeleton(folder), CPU) as slices:
        assert [first for first, _ in slices] == list(range(VOCAB))


def damaged(folder: Path, name: str, row: int) -> Path:
    """A checkpoint of one shard in which a row of a tensor holds a NaN at place 3."""
    tiny.save_model(folder, ARCHITECTURES["llama-untied"], max_shard_size="10MB")
    tensors = load_file(folder / "model.safetensors")
    tensors[name][row, 3] = torch.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_embeddings_of_tokens_that_do_not_occur_are_not_read(tmp_path: Path):
    folder = damaged(tmp_path, "model.embed_tokens.weight", row=77)
    tokens_NT = random_tokens(2)
    tokens_NT[tokens_NT == 77] = 78
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).get_input_embeddings()(tokens_NT)
    with prologue(open_skeleton(folder), CPU) as embed:
        assert torch.equal(embed(tokens_NT), expected)


def test_damaged_embedding_of_a_token_that_occurs_is_named(tmp_path: Path):
    folder = damaged(tmp_path, "model.embed_tokens.weight", row=77)
    with prologue(open_skeleton(folder), CPU) as embed, pytest.raises(CheckpointError) as caught:
        embed(torch.tensor([[5, 77, 80]]))
    message = str(caught.value)
    assert f"{folder / 'model.safetensors'}: tensor model.embed_tokens.weight holds nan" in message
    assert "[77, 3]" in message and "\n" not in message, message


def test_damaged_head_is_named_when_its_slice_is_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    use_slices(monkeypatch)
    folder = damaged(tmp_path, "lm_head.weight", row=120)
    with epilogue(open_skeleton(folder), CPU) as slices:
        assert [next(slices)[0], next(slices)[0]] == [0, 50]
        with pytest.raises(CheckpointError, match=r"tensor lm_head.weight holds nan at \[120, 3\]"):
            next(slices)


@pytest.mark.parametrize("end", [prologue, epilogue])
def test_end_is_in_memory_only_while_it_is_used(folder: Path, end: Callable):
    skeleton = open_skeleton(folder)
    with end(skeleton, CPU):
        assert not skeleton.model.model.norm.weight.is_meta
    assert all(tensor.is_meta for tensor in [*skeleton.model.parameters(), *skeleton.model.buffers()])


@pytest.mark.parametrize("end", [prologue, epilogue])
def test_models_beside_the_text_decoder_are_not_read(tmp_path: Path, end: Callable):
    skeleton = open_skeleton(tiny.save_model(tmp_path, ARCHITECTURES["gemma4-wrapper"]))
    with end(skeleton, CPU):
        inner = skeleton.model.model
        assert not inner.language_model.norm.weight.is_meta
        towers = [*inner.vision_tower.parameters(), *inner.audio_tower.parameters()]
        assert towers and all(parameter.untyped_storage().nbytes() == 4 for parameter in towers)
        assert all(parameter.isnan().all() for parameter in towers)


def test_embedded_hidden_states_are_let_go_after_the_prologue(folder: Path):
    with prologue(open_skeleton(folder), CPU) as embed:
        hidden_NTD = embed(random_tokens(2))
        kept = weakref.ref(hidden_NTD)
        del hidden_NTD
    assert kept() is None


def test_final_hidden_states_are_let_go_after_the_epilogue(folder: Path):
    hidden_NTD = torch.randn(1, LENGTH, 48)
    kept = weakref.ref(hidden_NTD)
    with epilogue(open_skeleton(folder), CPU) as slices:
        for _, to_logits in slices:
            to_logits(hidden_NTD)
    del hidden_NTD
    assert kept() is None


def test_tokens_may_be_embedded_in_parts(folder: Path):
    tokens_NT = random_tokens(3)
    with prologue(open_skeleton(folder), CPU) as embed:
        assert torch.equal(torch.cat([embed(tokens_NT[:1]), embed(tokens_NT[1:])]), embed(tokens_NT))


def test_head_stored_beside_the_embedding_is_not_tied_although_the_config_says_so(tmp_path: Path):
    folder = tiny.save_model(tmp_path, LLAMA, max_shard_size="10MB")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = torch.randn_like(tensors["model.embed_tokens.weight"])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    tokens_NT = random_tokens(2)
    torch.testing.assert_close(
        streamed_logits(folder, tokens_NT), whole_model_logits(folder, tokens_NT), rtol=1e-5, atol=1e-5
    )
