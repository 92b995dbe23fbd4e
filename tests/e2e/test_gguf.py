"""Finished runs as GGUF, loaded by transformers, which unpacks them, beside the runs themselves."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3TextConfig

import tiny
from runs import ONE_RANK, run_quantize
from shardq.cli import parse
from shardq.commands.export import export
from shardq.errors import ConfigError, UnsupportedModelError
from shardq.formats.block_file import read_block
from shardq.formats.gguf_tokenizer import add_tokenizer

RTN = ("--quant.method", "rtn")
TEXTS = ["the quick brown fox", "a lazy dog sleeps 12 times", "the dog and the fox run", "quick quick quick"] * 10
UNSEEN = "the fox sleeps 3 times,\n  a quick dog's été"
TOKENS = torch.arange(3, 51).view(2, 24)


def add_bpe(folder: Path, pre_tokenizer: pre_tokenizers.PreTokenizer | None = None) -> None:
    """A byte-level tokenizer with two special tokens and one added word."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"],
                                  show_progress=False)  # fmt: skip
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_tokens(["zebra"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')


def add_sentencepiece(folder: Path, model_type: str = "bpe") -> None:
    model = io.BytesIO()
    SentencePieceTrainer.train(sentence_iterator=iter(TEXTS), model_writer=model, model_type=model_type, vocab_size=40,
                               hard_vocab_limit=False, minloglevel=2)  # fmt: skip
    (folder / "tokenizer.model").write_bytes(model.getvalue())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama of two blocks with a tokenizer. Read only."""
    folder = tiny.save_llama(tmp_path_factory.mktemp("model"), num_blocks=2)
    add_bpe(folder)
    return folder


@pytest.fixture(scope="module")
def run(model: Path, token_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run for GGUF, 4 bits in groups of 32, with its export. Read only."""
    output = tmp_path_factory.mktemp("gguf") / "out"
    run_quantize(
        model, token_file, output, *RTN, "--target", "gguf", "--quant.group_size", 32, "--export.formats", "gguf"
    )
    return output


def run_export(run: Path, folder: Path) -> dict:
    return export(parse("export", [str(run), "--format", "gguf", "--output", str(folder)]), ONE_RANK)


@torch.inference_mode()
def logits(folder: Path, **options: object) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()(TOKENS).logits


def fields(path: Path) -> dict[str, object]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def test_transformers_loads_the_run_bit_for_bit(run: Path):
    assert torch.equal(logits(run / "gguf", gguf_file="model.gguf"), logits(run))


def test_weights_are_those_of_the_codes(run: Path):
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(run / "gguf" / "model.gguf").tensors}
    linears = read_block(run / "blocks" / "block-00001.safetensors")
    found = tensors["blk.1.ffn_down.weight"]
    assert found.tensor_type == gguf.GGMLQuantizationType.Q4_0 and found.n_bytes == found.n_elements // 32 * 18
    exact = linears["model.layers.1.mlp.down_proj"].dequantized().numpy()
    assert np.array_equal(gguf.dequantize(found.data, found.tensor_type), exact)
    assert "output.weight" not in tensors, "the head is tied to the embedding"
    assert tensors["token_embd.weight"].tensor_type == gguf.GGMLQuantizationType.BF16
    assert tensors["blk.0.attn_norm.weight"].tensor_type == gguf.GGMLQuantizationType.F32


def test_the_tokenizer_is_the_model_s(run: Path, model: Path):
    loaded = AutoTokenizer.from_pretrained(run / "gguf", gguf_file="model.gguf")
    expected = AutoTokenizer.from_pretrained(model)(UNSEEN, add_special_tokens=False)["input_ids"]
    assert loaded(UNSEEN, add_special_tokens=False)["input_ids"] == expected
    found = fields(run / "gguf" / "model.gguf")
    tokens, roles = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert (found["tokenizer.ggml.model"], found["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    assert (found["tokenizer.ggml.bos_token_id"], found["tokenizer.ggml.eos_token_id"]) == (0, 1)
    assert (tokens[290], tokens[291], len(tokens)) == ("zebra", "[PAD291]", 300)
    role = gguf.TokenType
    assert [roles[number] for number in (0, 5, 290, 299)] == [role.CONTROL, role.NORMAL, role.USER_DEFINED, role.UNUSED]


GRIDS = [
    ("--quant.bits", 8),
    ("--quant.bits", 4, "--quant.symmetric", "false", "--quant.group_size", 32),
    ("--quant.bits", 3, "--quant.ignore", "*.o_proj"),
]
LPBQ = ("--quant.group_size", 32, "--quant.decompressed_bits", 8)
ROUNDED = [*(pytest.param(grid, marks=pytest.mark.slow) for grid in GRIDS), LPBQ]


@pytest.mark.parametrize("grid", ROUNDED, ids=lambda grid: " ".join(map(str, grid)))
def test_a_run_without_a_target_is_rounded_on_the_way(grid: tuple, model: Path, token_file: Path, tmp_path: Path):
    run_quantize(model, token_file, tmp_path / "run", *RTN, *grid)
    assert 0 < run_export(tmp_path / "run", tmp_path / "gguf")["scale_change"] < 2**-9
    found, exact = logits(tmp_path / "gguf", gguf_file="model.gguf"), logits(tmp_path / "run")
    assert 0 < (found - exact).abs().max() < 0.01 * exact.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("rope_type", ["linear", "llama3"])
def test_scaled_positions_are_divisors_of_the_frequencies(rope_type: str, token_file: Path, tmp_path: Path):
    rope = {"rope_type": rope_type, "factor": 4.0, "rope_theta": 5000.0}
    if rope_type == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    model = tiny.save_llama(tmp_path / "model", num_blocks=1, rope_parameters=rope)
    add_bpe(model)
    run_quantize(model, token_file, tmp_path / "run", *RTN, "--export.formats", "gguf")
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "run" / "gguf" / "model.gguf").tensors}
    divisors = torch.from_numpy(tensors["rope_freqs.weight"].copy())
    base = 5000.0 ** -(torch.arange(0, 16, 2) / 16)
    own = AutoModelForCausalLM.from_pretrained(model).model.rotary_emb.inv_freq
    assert torch.allclose(base / divisors, own, rtol=1e-6) and divisors.max() == pytest.approx(4.0, rel=1e-6)


@pytest.mark.slow
def test_a_sentencepiece_tokenizer_is_written(token_file: Path, tmp_path: Path):
    model = tiny.save_llama(tmp_path / "model", num_blocks=1)
    add_sentencepiece(model)
    run_quantize(model, token_file, tmp_path / "run", *RTN, "--export.formats", "gguf")
    found = fields(tmp_path / "run" / "gguf" / "model.gguf")
    assert found["tokenizer.ggml.model"] == "llama" and found["tokenizer.ggml.scores"][299] == -10000
    assert len(found["tokenizer.ggml.tokens"]) == len(found["tokenizer.ggml.token_type"]) == 300


def tokenizer_fields(folder: Path, vocabulary_size: int) -> dict[str, list]:
    """What is said of a checkpoint's tokenizer: tokens, their types, and scores if there are any."""
    writer = gguf.GGUFWriter(None, "llama")
    add_tokenizer(writer, folder, vocabulary_size)
    [values] = writer.kv_data
    return {name.rpartition(".")[2]: value.value for name, value in values.items()}


def test_special_tokens_of_a_sentencepiece_model_are_control_tokens(tmp_path: Path):
    add_sentencepiece(tmp_path)
    base = len(SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model")))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|im_start|>": base, "<|tool|>": base + 1}))
    about = {"content": "\u2581big\u2581word", "special": False}
    decoder = {"0": {"content": "<unk>", "special": True}, str(base + 3): about}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"additional_special_tokens": ["<|im_start|>"]}))
    found, role = tokenizer_fields(tmp_path, base + 6), gguf.TokenType
    texts = ["<|im_start|>", "<|tool|>", f"[PAD{base + 2}]", " big word"]
    assert found["tokens"][base : base + 4] == [text.encode() for text in texts] and len(found["tokens"]) == base + 6
    assert found["token_type"][:4] == [role.UNKNOWN, role.CONTROL, role.CONTROL, role.NORMAL]
    assert found["token_type"][base:] == [role.CONTROL, role.USER_DEFINED, role.UNUSED, role.USER_DEFINED,
                                          role.UNUSED, role.UNUSED]  # fmt: skip
    assert found["scores"][base : base + 2] == [-1000.0, -1000.0] and found["scores"][3] != -1000.0


@pytest.mark.parametrize("add", [add_bpe, add_sentencepiece])
def test_tokens_without_a_row_are_refused(add: Callable[[Path], None], tmp_path: Path):
    add(tmp_path)
    roles = tokenizer_fields(tmp_path, 400)["token_type"]
    num_tokens = 400 - roles.count(gguf.TokenType.UNUSED)
    assert len(tokenizer_fields(tmp_path, num_tokens)["tokens"]) == num_tokens
    with pytest.raises(UnsupportedModelError, match=f"has {num_tokens} tokens, the embedding {num_tokens - 1} rows"):
        tokenizer_fields(tmp_path, num_tokens - 1)


def test_what_does_not_fit_is_refused_before_work_starts(model: Path, token_file: Path, tmp_path: Path):
    def refused(source: Path, error: type, words: str, *more: object) -> None:
        with pytest.raises(error, match=words):
            run_quantize(source, token_file, tmp_path / "out", *RTN, "--export.formats", "gguf", *more)
        assert not (tmp_path / "out" / "blocks").exists()

    refused(model, ConfigError, "groups of 16", "--quant.group_size", 16)
    refused(model, ConfigError, "scales are kept in float16, in which they are no whole", *LPBQ, "--target", "gguf")
    refused(model, ConfigError, "asymmetric grids of 8 bits", "--quant.bits", 8, "--quant.symmetric", "false")
    bare = tiny.save_llama(tmp_path / "bare", num_blocks=1)
    refused(bare, UnsupportedModelError, "needs tokenizer.json or tokenizer.model")
    add_bpe(bare, pre_tokenizers.Whitespace())
    refused(bare, UnsupportedModelError, "no name is known for how its tokenizer .BPE, Whitespace. splits text")
    add_sentencepiece(bare, "unigram")
    refused(bare, UnsupportedModelError, "a unigram model")
    narrow = tiny.save_llama(tmp_path / "narrow", num_blocks=1, intermediate_size=80)
    add_bpe(narrow)
    refused(narrow, ConfigError, "down_proj has 80 input channels")
    gemma = Gemma3TextConfig(vocab_size=300, num_hidden_layers=1, hidden_size=64, num_attention_heads=4,
                             num_key_value_heads=2, intermediate_size=64, head_dim=16)  # fmt: skip
    foreign = tiny.save_model(tmp_path / "foreign", gemma)
    refused(foreign, UnsupportedModelError, "model type gemma3_text: GGUF is written of")
