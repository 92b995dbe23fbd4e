"""What became of every stored tensor: each is counted once, under its kind."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import Gemma3Config, GptOssConfig, Qwen2Config

import tiny
from shardq.config import QuantOptions
from shardq.model.skeleton import open_skeleton
from shardq.rundir.account import Account, account_of
from shardq.rundir.plan import make_plan

SIZES = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 8}  # fmt: skip
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
          "image_size": 16, "patch_size": 8}  # fmt: skip


def stored_sizes(folder: Path) -> dict[str, int]:
    """Number of values of every stored tensor, as the safetensors library reads the headers."""
    sizes = {}
    for shard in folder.glob("*.safetensors"):
        with safe_open(shard, framework="pt") as file:
            sizes |= {name: math.prod(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return sizes


def accounted(folder: Path, *ignore: str) -> tuple[Account, dict[str, set[str]]]:
    """The account of a folder, and its names by kind; every stored value must be in it once."""
    skeleton, quant = open_skeleton(folder), QuantOptions(ignore=ignore)
    grids = make_plan(skeleton, quant).grids
    account, sizes = account_of(skeleton, grids, quant.ignored), stored_sizes(folder)
    left = [name for part in account.left for name in part.names]
    assert sorted([*left, *(skeleton.tensor(f"{name}.weight").name for name in grids)]) == sorted(sizes)
    assert account.num_parameters == sum(sizes.values())
    assert account.num_quantized == sum(sizes.values()) - sum(sizes[name] for name in left)
    assert all(part.num_parameters == sum(sizes[name] for name in part.names) for part in account.left)
    return account, {part.kind: set(part.names) for part in account.left}


def with_tensors(folder: Path, names: tuple[str, ...]) -> None:
    """Store further tensors in a shard of their own."""
    save_file({name: torch.ones(8, 8) for name in names}, folder / "further.safetensors")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] |= dict.fromkeys(names, "further.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_every_tensor_of_a_text_model_has_its_kind(tmp_path: Path):
    config = Qwen2Config(**SIZES, tie_word_embeddings=False)
    account, kinds = accounted(tiny.save_model(tmp_path, config), "*.o_proj")
    layers = [f"model.layers.{number}" for number in range(2)]
    norms = ("input_layernorm", "post_attention_layernorm")
    assert kinds == {
        "embedding": {"model.embed_tokens.weight"},
        "head": {"lm_head.weight"},
        "norm": {f"{layer}.{norm}.weight" for layer in layers for norm in norms} | {"model.norm.weight"},
        "bias": {f"{layer}.self_attn.{name}_proj.bias" for layer in layers for name in "qkv"},
        "linear": {f"{layer}.self_attn.o_proj.weight" for layer in layers},
    }
    assert [part.reason for part in account.left if part.kind == "linear"] == ["quant.ignore '*.o_proj'"]
    assert [part.num_bytes for part in account.left if part.kind == "head"] == [50 * 32 * 2]


def test_fused_experts_are_quantized_in_parts(tmp_path: Path):
    config = GptOssConfig(**SIZES, num_local_experts=2, num_experts_per_tok=1)
    folder = tiny.save_model(tmp_path, config)
    skeleton, quant = open_skeleton(folder), QuantOptions(ignore=("*.experts.0.up_proj",))
    account = account_of(skeleton, make_plan(skeleton, quant).grids, quant.ignored)
    assert account.num_parameters == sum(stored_sizes(folder).values())
    [ignored] = [part for part in account.left if part.num_parameters == 2 * 32 * 48]
    assert ignored.reason == "quant.ignore '*.experts.0.up_proj'" and "unused" not in {
        part.kind for part in account.left
    }


def test_tensors_that_the_model_does_not_take_are_named(llama: Path, tmp_path: Path):
    folder = shutil.copytree(llama, tmp_path / "model")
    further = ("mtp.layers.0.eh_proj.weight", "model.layers.3.mlp.up_proj.weight", "model.mtp_norm.weight")
    with_tensors(folder, (*further, "model.layers.1.rotary.inv_freq", "adapter.weight"))
    _, kinds = accounted(folder)
    assert kinds["further tokens"] == set(further)
    assert kinds["unused"] == {"model.layers.1.rotary.inv_freq", "adapter.weight"}
    assert kinds["embedding"] == {"model.embed_tokens.weight"}  # the head is tied to it


def test_parts_outside_the_text_decoder_go_by_their_names(tmp_path: Path):
    text = SIZES | {"sliding_window": 16}
    config = Gemma3Config(text_config=text, vision_config=VISION, mm_tokens_per_image=4, tie_word_embeddings=True)
    account, kinds = accounted(tiny.save_model(tmp_path, config))
    assert set(kinds) == {"embedding", "norm", "vision tower", "multi modal projector"}
    assert all("vision_tower" in name for name in kinds["vision tower"])
    assert {part.reason for part in account.left if "m" in part.kind[:1]} == {"outside the text decoder"}


def test_a_linear_that_no_pattern_leaves_is_left_by_the_target(llama: Path):
    skeleton = open_skeleton(llama)
    names = list(make_plan(skeleton, QuantOptions()).grids)
    whole, part = account_of(skeleton, names, ()), account_of(skeleton, names[1:], ())
    size = math.prod(skeleton.tensor(f"{names[0]}.weight").shape)
    assert whole.num_quantized - part.num_quantized == size
    assert [left.reason for left in part.left if left.kind == "linear"] == ["left by the rules of the target"]


@pytest.mark.parametrize(("number", "said"), [(17, "17"), (7_240_000, "7.2 M"), (8.03e9, "8.0 B")])
def test_the_account_in_words(number: int, said: str):
    share, *lines = Account(num_quantized=int(number), left=()).lines()
    assert share == f"quantized: 100.0% of {said} parameters; left as they are:" and lines == []
