"""vLLM's rules on shapes, checked on the model before anything runs."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    DeepseekV3Config,
    GPT2Config,
    Llama4TextConfig,
    OPTConfig,
    PreTrainedConfig,
    Qwen3_5TextConfig,
    Qwen3MoeConfig,
    Qwen3VLConfig,
)

import tiny
from shardq.config import ExportOptions, QuantizeConfig, QuantOptions
from shardq.errors import ConfigError, UnsupportedModelError
from shardq.export.target import as_served, check_served, with_narrow_left
from shardq.model.skeleton import open_skeleton
from shardq.rundir.plan import make_plan
from tests.families.tiny_config import tiny_config


def check(
    folder: Path, target: str | None = "vllm", gpus: int = 1, activation_bits: int = 16, formats=(), **quant: object
) -> None:
    export = ExportOptions(activation_bits=activation_bits, formats=formats)
    config = QuantizeConfig(
        model=str(folder),
        target=target,
        tensor_parallel=gpus,
        quant=QuantOptions(**{"group_size": -1} | quant),
        export=export,
    )
    skeleton = open_skeleton(folder)
    plan = make_plan(skeleton, config.quant)
    check_served(config, skeleton, as_served(config.target, config.export, skeleton, plan))


@pytest.mark.parametrize("quant", [{"bits": 4}, {"bits": 8, "group_size": 32}, {"bits": 4, "symmetric": False}])
def test_grids_that_vllm_has_kernels_for_pass(llama: Path, quant: dict):
    check(llama, **quant)


@pytest.mark.parametrize(
    "wrong, reason",
    [
        ({"bits": 3}, "3 bits"),
        ({"bits": 4, "group_size": 16}, "groups of 16"),
        ({"bits": 8, "symmetric": False}, "asymmetric grids of 8 bits"),
        ({"bits": 4, "symmetric": False, "activation_bits": 8}, "symmetric weight grid"),
        ({"bits": 8, "group_size": 32, "activation_bits": 8}, "groups of 32"),
        ({"bits": 4, "group_size": 32, "decompressed_bits": 8}, "left out where scales are kept in bfloat16"),
    ],
)
def test_a_grid_without_a_kernel_is_refused(llama: Path, wrong: dict, reason: str):
    with pytest.raises(ConfigError, match=reason):
        check(llama, **wrong)


def test_a_size_that_no_kernel_takes_is_refused_by_the_linears_name(tmp_path: Path):
    folder = tiny.save_llama(tmp_path, num_blocks=2, intermediate_size=80)
    with pytest.raises(ConfigError, match=r"model\.layers\.0\.mlp\.gate_proj has 80 output channels.*multiple of 32"):
        check(folder, bits=4)
    check(folder, bits=8, activation_bits=8)
    check(folder, bits=4, target=None)
    check(folder, bits=4, ignore="*.gate_proj,*.up_proj,*.down_proj")


WIDE = {"num_blocks": 1, "hidden": 256, "head_dim": 64}  # 4 heads, 2 of them of keys and values


@pytest.mark.parametrize("gpus", [1, 2, 4])
@pytest.mark.parametrize("group_size", [-1, 64])
def test_shapes_that_can_be_split_pass(tmp_path: Path, gpus: int, group_size: int):
    """On 4, each head of keys and values is on two."""
    check(tiny.save_llama(tmp_path, **WIDE), gpus=gpus, group_size=group_size)


@pytest.mark.parametrize(
    "model, gpus, quant, reason",
    [
        ({}, 8, {}, "4 attention heads do not divide; on 1 or 2 or 4"),
        ({}, 3, {}, "on 3 GPUs: 4 attention heads"),
        ({"num_attention_heads": 16, "num_key_value_heads": 3}, 4, {}, "3 heads of keys and values neither"),
        ({"head_dim": 32}, 4, {}, r"o_proj has 128 input channels, 32 on each of 4 GPUs; .* whole groups of 64"),
        ({"intermediate_size": 320}, 4, {}, r"gate_proj has 320 output channels, 80 on each .* multiple of 32"),
        ({"intermediate_size": 320}, 2, {}, r"down_proj has 320 input channels, 160 on each .* groups of 64"),
    ],
)
def test_shapes_that_cannot_be_split_are_refused(tmp_path: Path, model: dict, gpus: int, quant: dict, reason: str):
    folder = tiny.save_llama(tmp_path, **(WIDE | model))
    with pytest.raises(ConfigError, match=reason):
        check(folder, gpus=gpus, group_size=64, **quant)


def test_linears_for_which_a_wrapper_declares_no_split_are_split_as_vllm_does(tmp_path: Path):
    text = {"vocab_size": 300, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1, "head_dim": 32,
            "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
    vision = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48, "out_hidden_size": 128}
    folder = tiny.save_model(tmp_path, Qwen3VLConfig(text_config=text, vision_config=vision))
    check(folder, gpus=2)
    with pytest.raises(ConfigError, match=r"o_proj has 128 input channels, 64 on each of 2 GPUs; .* groups of 128"):
        check(folder, gpus=2, group_size=128)


def test_an_architecture_that_declares_no_split_is_refused(tmp_path: Path):
    sizes = {"hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 128, "vocab_size": 300}
    config = OPTConfig(num_hidden_layers=1, num_attention_heads=4, max_position_embeddings=128, **sizes)
    folder = tiny.save_model(tmp_path, config)
    check(folder)
    with pytest.raises(ConfigError, match="OPTForCausalLM declares no way to split it; on 1 it is served"):
        check(folder, gpus=2)


@pytest.mark.parametrize(
    "wrong, reason",
    [
        ({"bits": 5}, "gptq: 5 bits"),
        ({"bits": 4, "symmetric": False, "target": "vllm"}, "vLLM takes gptq on symmetric grids"),
        ({"bits": 2, "target": "vllm"}, "2 bits"),
    ],
)
def test_gptq_is_refused_before_the_run(llama: Path, wrong: dict, reason: str):
    with pytest.raises(ConfigError, match=reason):
        check(llama, **({"target": None, "formats": "gptq"} | wrong))
    check(llama, target=None, formats="gptq", bits=2)


def test_sizes_that_gptq_cannot_hold_are_refused_before_the_run(tmp_path: Path):
    folder = tiny.save_llama(tmp_path, num_blocks=1, intermediate_size=80)
    with pytest.raises(ConfigError, match=r"gptq: model\.layers\.0\.mlp\.gate_proj has 80 output"):
        check(folder, target=None, formats="gptq")
    check(folder, target=None, formats="gptq", ignore="*.mlp.*")


GPT2 = GPT2Config(vocab_size=50, n_positions=16, n_embd=32, n_layer=1, n_head=2)
LLAMA4 = Llama4TextConfig(
    vocab_size=50, hidden_size=32, intermediate_size=64, intermediate_size_mlp=64, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=2, head_dim=16, num_local_experts=2, pad_token_id=0,
)  # fmt: skip


@pytest.mark.parametrize("name", ["compressed-tensors", "gptq"])
@pytest.mark.parametrize(
    "config, reason",
    [(GPT2, "transformer.h.0.attn.c_attn is a Conv1D"), (LLAMA4, "experts.0.gate_proj is of experts")],
    ids=["gpt2", "llama4"],
)
def test_linears_that_programs_have_not_are_refused(tmp_path: Path, name: str, config: PreTrainedConfig, reason: str):
    folder = tiny.save_model(tmp_path, config)
    with pytest.raises(UnsupportedModelError, match=rf"^{name}: .*{reason}"):
        check(folder, target=None, formats=name)
    check(folder, target=None, formats="hf")


@pytest.mark.parametrize(
    "ignored, left", [("*.k_proj", r"self_attn\.k_proj"), ("model.layers.1.mlp.up_proj", r"layers\.1\.mlp.*up_proj")]
)
def test_linears_that_vllm_fuses_are_quantized_together_or_not_at_all(llama: Path, ignored: str, left: str):
    with pytest.raises(ConfigError, match=left):
        check(llama, ignore=ignored)
    check(llama, ignore=f"{ignored},*.q_proj,*.k_proj,*.v_proj,*.gate_proj,*.up_proj")
    check(llama, ignore=ignored, target=None)


def save_mixture(folder: Path, hidden: int = 128, inner: int = 384) -> Path:
    config = Qwen3MoeConfig(
        vocab_size=300, hidden_size=hidden, moe_intermediate_size=inner, num_hidden_layers=1, num_attention_heads=8,
        num_key_value_heads=8, head_dim=64, num_experts=2, num_experts_per_tok=1, max_position_embeddings=128,
    )  # fmt: skip
    return tiny.save_model(folder, config)


@pytest.mark.parametrize(
    ("sizes", "gpus", "quant", "reason"),
    [
        ({}, 4, {"group_size": 128},
         r"0\.down_proj has 384 input channels, 96 on each of 4 GPUs; .* groups of 128; on 1"),
        ({}, 8, {"group_size": -1}, r"0\.gate_proj has 384 output channels, 48 on each .* multiple of 64; on 1 or 2"),
        ({"hidden": 64}, 1, {"group_size": -1}, r"0\.gate_proj has 64 input channels; .* multiple of 128"),
        ({}, 1, {"ignore": "*.experts.1.down_proj"}, r"one scheme for all experts of model\.layers\.0\.mlp\.experts, .*"
         r"mlp\.experts\.1\.down_proj is not"),
    ],
)  # fmt: skip
def test_experts_that_vllm_cannot_serve_are_refused(tmp_path: Path, sizes: dict, gpus: int, quant: dict, reason: str):
    folder = save_mixture(tmp_path, **sizes)
    with pytest.raises(ConfigError, match=reason):
        check(folder, gpus=gpus, **quant)
    check(folder, group_size=32)
    check(folder, ignore="*.experts.*")


def test_experts_with_biases_are_refused(tmp_path: Path):
    folder = tiny.save_model(tmp_path, tiny_config("gpt_oss"))
    with pytest.raises(ConfigError, match=r"mlp\.experts have biases, .* --quant.ignore 'mlp\.experts\.\*'"):
        check(folder, group_size=32)
    check(folder, group_size=32, ignore="mlp.experts.*")


def save_mla(folder: Path, rope_channels: int) -> Path:
    """A dense DeepSeek: vLLM makes one of `q_a_proj`, and `kv_a_proj_with_mqa` of 32 + rope_channels outputs."""
    config = DeepseekV3Config(
        vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=2, first_k_dense_replace=2,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=128, q_lora_rank=32, kv_lora_rank=32,
        qk_rope_head_dim=rope_channels, qk_nope_head_dim=32 - rope_channels, v_head_dim=16,
    )  # fmt: skip
    return tiny.save_model(folder, config)


@pytest.mark.parametrize("ignored", ["q_a_proj", "kv_a_proj_with_mqa"])
def test_compressed_queries_and_keys_are_quantized_together_or_not_at_all(tmp_path: Path, ignored: str):
    folder = save_mla(tmp_path, rope_channels=32)
    check(folder)
    with pytest.raises(ConfigError, match=f"vLLM fuses q_a_proj, kv_a_proj_with_mqa of .*; self_attn.{ignored} is not"):
        check(folder, ignore=f"*.{ignored}")
    check(folder, ignore="*.q_a_proj,*.kv_a_proj_with_mqa")


@pytest.mark.parametrize(
    "save, asked",
    [
        (lambda folder: save_mla(folder, rope_channels=8), {"q_a_proj", "kv_a_proj_with_mqa"}),
        (lambda folder: tiny.save_llama(folder, intermediate_size=80), {"gate_proj", "up_proj", "down_proj"}),
    ],
    ids=["mla", "llama"],
)
def test_advice_on_what_to_ignore_leads_to_a_run_that_is_served(tmp_path: Path, save: Callable, asked: set[str]):
    folder, ignored = save(tmp_path), []
    while advice := refusal(folder, ignored):
        more = re.search("--quant.ignore '([^']+)'", advice).group(1).split(",")
        assert not set(more) & set(ignored)
        ignored += more
    assert {name.removeprefix("*.") for name in ignored} == asked


def refusal(folder: Path, ignored: list[str]) -> str | None:
    try:
        return check(folder, ignore=",".join(ignored))
    except ConfigError as error:
        return str(error)


def test_a_format_that_cannot_hold_the_grid_is_refused_without_a_target_too(llama: Path):
    with pytest.raises(ConfigError, match="3 bits"):
        check(llama, target=None, bits=3, formats="compressed-tensors")
    check(llama, target=None, bits=3, formats="hf")


@pytest.mark.parametrize("dtype, name", [("float16", "float16"), ("bfloat16", "bfloat16"), ("float32", "bfloat16")])
def test_scales_are_kept_in_the_targets_dtype(tmp_path: Path, dtype: str, name: str):
    skeleton = open_skeleton(tiny.save_llama(tmp_path, num_blocks=1, dtype=getattr(torch, dtype)))
    for target, expected in (("vllm", name), ("gguf", "float16"), (None, None)):
        plan = as_served(target, ExportOptions(), skeleton, make_plan(skeleton, QuantOptions()))
        assert {grid.scale_dtype for grid in plan.grids.values()} == {plan.scale_dtype} == {expected}


def save_gated(folder: Path, num_heads: int) -> Path:
    """A dense Qwen 3.5 in which vLLM makes one of `in_proj_b` and `in_proj_a`, of as many outputs as heads each."""
    config = Qwen3_5TextConfig(
        vocab_size=300, hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, linear_num_value_heads=num_heads, linear_num_key_heads=num_heads // 2,
        linear_key_head_dim=16, linear_value_head_dim=16, layer_types=["linear_attention", "full_attention"],
    )  # fmt: skip
    return tiny.save_model(folder, config)


def narrow_in(folder: Path, **options: object) -> list[str]:
    """What a run with these options says that it leaves in float of a model, which is then served."""
    skeleton, said = open_skeleton(folder), []
    config = with_narrow_left(QuantizeConfig(model="", **({"target": "vllm"} | options)), skeleton, said.append)
    plan = make_plan(skeleton, config.quant)
    check_served(config, skeleton, as_served(config.target, config.export, skeleton, plan))
    return said


def test_linears_too_narrow_for_the_kernels_stay_in_float(tmp_path: Path):
    folder = save_gated(tmp_path / "8", 8)
    (line,) = narrow_in(folder)
    assert line.startswith("linear_attn.in_proj_a, linear_attn.in_proj_b: in float")
    assert narrow_in(folder, quant=QuantOptions(ignore="in_proj_a,in_proj_b")) == []
    assert narrow_in(folder, target=None) == [line]
    assert narrow_in(folder, target=None, export=ExportOptions(checkpoint="plain")) == []
    assert narrow_in(save_gated(tmp_path / "32", 32)) == []


def test_a_narrow_linear_that_vllm_makes_one_of_with_a_wide_one_is_refused(tmp_path: Path):
    folder = tiny.save_llama(tmp_path, num_blocks=1, hidden=256, head_dim=16, num_key_value_heads=1)
    with pytest.raises(ConfigError, match="k_proj has 16 output channels"):
        narrow_in(folder)
