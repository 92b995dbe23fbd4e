"""Opening a checkpoint: what is accepted, what is refused and in which words, which linears are chosen."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    DeepseekV3Config,
    Gemma3Config,
    HrmTextConfig,
    JetMoeConfig,
    Llama4Config,
    OpenAIGPTConfig,
    PreTrainedConfig,
    XLMConfig,
)
from transformers.utils import logging as transformers_logging

import tiny
from shardq.errors import CheckpointError, ShardQError, UnsupportedModelError
from shardq.model.skeleton import open_skeleton

SIZES = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip


@pytest.fixture
def copied(llama: Path, tmp_path: Path) -> Path:
    """A copy of the tiny Llama that a test may damage."""
    return shutil.copytree(llama, tmp_path / "model")


def assert_refused(folder: Path, kind: type[ShardQError], *parts: str) -> None:
    """Opening fails with an error of exactly this kind whose only line holds all parts."""
    with pytest.raises(ShardQError) as caught:
        open_skeleton(folder)
    message = str(caught.value)
    assert type(caught.value) is kind, message
    assert "\n" not in message
    assert [part for part in parts if part not in message] == [], message


def change_config(folder: Path, **fields: object) -> None:
    """Replace fields of config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def replace_tensor(folder: Path, name: str, tensor: torch.Tensor | None) -> Path:
    """Replace one stored tensor, or with None take it out of its shard and of the index; give the shard."""
    index_path = folder / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    shard = folder / index["weight_map"][name]
    tensors = load_file(shard)
    if tensor is None:
        del tensors[name], index["weight_map"][name]
    else:
        tensors[name] = tensor
    save_file(tensors, shard)
    index_path.write_text(json.dumps(index))
    return shard


class TestOpening:
    def test_blocks_and_their_tensors_are_found_without_reading_weights(self, llama: Path):
        skeleton = open_skeleton(llama)
        assert skeleton.names == ["model.layers.0", "model.layers.1", "model.layers.2"]
        assert all(parameter.is_meta for block in skeleton.blocks for parameter in block.parameters())
        stored = {info.name for number in range(3) for info in skeleton.block_tensors(number).values()}
        assert stored == {name for name in skeleton.source.index if ".layers." in name}

    def test_tied_head_is_found_under_the_embedding(self, llama: Path):
        skeleton = open_skeleton(llama)
        assert "lm_head.weight" not in skeleton.source.index
        assert skeleton.tensor("lm_head.weight").name == "model.embed_tokens.weight"

    def test_blocks_of_a_model_with_a_vision_tower_are_those_of_its_text_decoder(self, tmp_path: Path):
        """Both have 2 layers, the tower's come first, and `_no_split_modules` names either."""
        config = Gemma3Config(text_config=SIZES | {"head_dim": 8}, vision_config=VISION, mm_tokens_per_image=1)
        skeleton = open_skeleton(tiny.save_model(tmp_path, config))
        assert skeleton.names == ["model.language_model.layers.0", "model.language_model.layers.1"]
        assert {type(block).__name__ for block in skeleton.blocks} == {"Gemma3DecoderLayer"}
        # The published names: the head is tied to the embedding, which is renamed as it is loaded.
        assert skeleton.tensor("lm_head.weight").name == "language_model.model.embed_tokens.weight"

    def test_text_model_is_built_where_a_wrappers_config_names_it(self, tmp_path: Path):
        text = SIZES | {"intermediate_size_mlp": 48, "moe_layers": [], "head_dim": 8}
        config = Llama4Config(text_config=text, vision_config=VISION | {"vision_output_dim": 16})
        folder = tiny.save_model(tmp_path, config.text_config)
        config.save_pretrained(folder)
        change_config(folder, architectures=["Llama4ForCausalLM"])
        assert open_skeleton(folder).names == ["model.layers.0", "model.layers.1"]

    def test_blocks_that_the_model_does_not_declare_are_found(self, tmp_path: Path):
        config = OpenAIGPTConfig(vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2)
        skeleton = open_skeleton(tiny.save_model(tmp_path, config))
        assert not skeleton.model._no_split_modules
        assert skeleton.names == ["transformer.h.0", "transformer.h.1"]

    def test_layer_that_transformers_does_not_build_may_be_of_another_kind(self, tmp_path: Path):
        """One more than `num_hidden_layers`, which predicts a further token: its experts stop nobody."""
        config = DeepseekV3Config(
            **SIZES | {"num_key_value_heads": 4}, first_k_dense_replace=2, q_lora_rank=16, kv_lora_rank=16,
            qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
        )  # fmt: skip
        folder = tiny.save_model(tmp_path, config, max_shard_size="1GB")
        names = [f"model.layers.2.mlp.experts.0.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")]
        shard = folder / "model.safetensors"
        save_file(load_file(shard) | {name: torch.ones(4, 4) for name in names}, shard)
        skeleton = open_skeleton(folder)
        assert skeleton.names == ["model.layers.0", "model.layers.1"] and set(skeleton.source.index) > set(names)

    def test_transformers_is_as_talkative_afterwards_as_before(self, llama: Path):
        before = transformers_logging.get_verbosity()
        open_skeleton(llama)
        assert transformers_logging.get_verbosity() == before


class TestRefusedConfig:
    def test_missing(self, copied: Path):
        (copied / "config.json").unlink()
        assert_refused(copied, CheckpointError, str(copied / "config.json"), "missing")

    @pytest.mark.parametrize("content", ['{"model_type": ', "", "\N{SNOWMAN}"])
    def test_not_json(self, copied: Path, content: str):
        (copied / "config.json").write_text(content)
        assert_refused(copied, CheckpointError, str(copied / "config.json"), "not a JSON object")

    def test_already_quantized(self, copied: Path):
        change_config(copied, quantization_config={"quant_method": "bitsandbytes"})
        assert_refused(copied, UnsupportedModelError, str(copied), "already quantized (bitsandbytes)")

    def test_already_quantized_by_a_method_without_name(self, copied: Path):
        change_config(copied, quantization_config={"bits": 4})
        assert_refused(copied, UnsupportedModelError, str(copied), "already quantized (unknown method)")

    def test_unknown_model_type(self, copied: Path):
        change_config(copied, model_type="nonesuch")
        assert_refused(copied, UnsupportedModelError, str(copied / "config.json"), "transformers cannot read it")

    def test_no_causal_language_model(self, copied: Path):
        change_config(copied, model_type="t5")
        assert_refused(copied, UnsupportedModelError, str(copied), "no causal language model", "T5Config")

    def test_kind_of_positions_that_transformers_does_not_know(self, copied: Path):
        change_config(copied, rope_parameters={"rope_type": "nonesuch", "rope_theta": 1e4})
        where = str(copied / "config.json")
        assert_refused(copied, UnsupportedModelError, where, "llama cannot be built", "KeyError: 'nonesuch'")

    def test_layers_in_several_lists(self, tmp_path: Path):
        folder = tiny.save_model(tmp_path, XLMConfig(vocab_size=50, emb_dim=16, n_layers=2, n_heads=2, causal=True))
        lists = ("transformer.attentions", "transformer.ffns")
        assert_refused(folder, UnsupportedModelError, "XLMWithLMHeadModel", "4 lists of blocks", *lists)

    @pytest.mark.parametrize("content", ["[]", "null", "3"])
    def test_json_that_is_no_object(self, copied: Path, content: str):
        (copied / "config.json").write_text(content)
        assert_refused(copied, CheckpointError, str(copied / "config.json"))

    @pytest.mark.parametrize("fields", [{"hidden_size": "abc"}, {"num_attention_heads": 5}], ids=str)
    def test_field_that_transformers_refuses(self, copied: Path, fields: dict):
        change_config(copied, **fields)
        assert_refused(copied, UnsupportedModelError, str(copied / "config.json"), "transformers cannot read it")

    def test_code_of_its_own_is_refused_without_a_question(self, copied: Path, capsys: pytest.CaptureFixture):
        auto_map = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
        change_config(copied, model_type="nonesuch", auto_map=auto_map)
        assert_refused(copied, UnsupportedModelError, str(copied / "config.json"))
        assert "y/N" not in capsys.readouterr().out


class TestRefusedTensors:
    @pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
    def test_missing(self, copied: Path, name: str):
        replace_tensor(copied, name, None)
        assert_refused(copied, CheckpointError, str(copied), f"tensor {name} is missing")

    def test_head_missing_where_nothing_is_tied(self, copied: Path):
        change_config(copied, tie_word_embeddings=False)
        assert_refused(copied, CheckpointError, str(copied), "tensor lm_head.weight is missing")

    @pytest.mark.parametrize("name", ["model.layers.2.self_attn.k_proj.weight", "model.embed_tokens.weight"])
    def test_wrong_shape(self, copied: Path, name: str):
        shard = replace_tensor(copied, name, torch.zeros(3, 5, dtype=torch.bfloat16))
        assert_refused(copied, CheckpointError, str(shard), name, "has shape [3, 5]", "config.json asks for")

    def test_block_more_than_there_are(self, copied: Path):
        change_config(copied, num_hidden_layers=4)
        assert_refused(copied, CheckpointError, str(copied), "tensor model.layers.3.")

    def test_integers_in_place_of_weights(self, copied: Path):
        name = "model.layers.0.mlp.down_proj.weight"
        shard = replace_tensor(copied, name, torch.zeros(64, 128, dtype=torch.int8))
        assert_refused(copied, UnsupportedModelError, str(shard), name, "has dtype I8", "BF16")

    def test_eight_bit_floats(self, copied: Path):
        name = "model.layers.0.mlp.down_proj.weight"
        shard = replace_tensor(copied, name, torch.zeros(64, 128).to(torch.float8_e4m3fn))
        assert_refused(copied, UnsupportedModelError, str(shard), name, "is stored as F8_E4M3", "bfloat16")

    @pytest.mark.parametrize(
        ("config", "parts"),
        [
            (JetMoeConfig(**SIZES, kv_channels=8, num_local_experts=2, num_experts_per_tok=1), ["fused experts"]),
            (HrmTextConfig(**SIZES), ["2 lists of blocks"]),
        ],
        ids=lambda value: getattr(value, "model_type", ""),
    )
    def test_other_tensors_are_called_what_they_are(self, tmp_path: Path, config: PreTrainedConfig, parts: list[str]):
        assert_refused(tiny.save_model(tmp_path, config, max_shard_size="1GB"), UnsupportedModelError, *parts)
