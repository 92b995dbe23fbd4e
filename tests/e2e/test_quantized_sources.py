"""Runs from sources whose weights are stored quantized: the same as runs from plain copies of what they decode to."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GptOssConfig,
    Kimi_K25Config,
    LlamaConfig,
    PretrainedConfig,
)

import tiny
from runs import ONE_RANK, result_files, run_evaluate, run_quantize
from shardq.cli import parse
from shardq.commands.tune import tune
from shardq.commands.verify import verify
from shardq.formats.floats import FP4_VALUES
from shardq.formats.quantized_source import open_checkpoint
from shardq.formats.shards import INDEX_FILE, open_index, read_tensor

TOKENS = torch.arange(3, 51).view(2, 24)
RTN = ("--quant.method", "rtn", "--calib.samples", 2)
SIZES = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16,
         "num_attention_heads": 4, "num_key_value_heads": 4, "initializer_range": 0.2}  # fmt: skip
INT4 = QuantizationScheme(
    targets=["Linear"], weights=QuantizationArgs(num_bits=4, group_size=32, strategy="group"), format="pack-quantized"
)


def to_int4(name: str, weight_OI: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    scale_OG = (weight_OI.float().unflatten(1, (-1, 32)).abs().amax(2) / 7).bfloat16()
    stored = compressor.compress({"weight": weight_OI, "weight_scale": scale_OG}, INT4)
    decoded = compressor.decompress(dict(stored), INT4)["weight"]
    return {name.removesuffix("weight") + part: tensor for part, tensor in stored.items()}, decoded


def to_fp8(name: str, weight_OI: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    scale_GH = weight_OI.float().unflatten(1, (-1, 32)).unflatten(0, (-1, 32)).abs().amax((1, 3)) / 448
    scale_OI = scale_GH.repeat_interleave(32, 0).repeat_interleave(32, 1)
    codes_OI = (weight_OI / scale_OI).to(torch.float8_e4m3fn)
    return {name: codes_OI, f"{name}_scale_inv": scale_GH}, (codes_OI.float() * scale_OI).bfloat16()


def to_mxfp4(name: str, weight_ECR: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    blocks_ERGB = weight_ECR.float().transpose(1, 2).unflatten(2, (-1, 32))
    exponents_ERG = (blocks_ERGB.abs().amax(3) / 6).log2().ceil()
    values = torch.tensor(FP4_VALUES)
    codes = ((blocks_ERGB / torch.exp2(exponents_ERG)[..., None])[..., None] - values).abs().argmin(4)
    decoded_ERC = (values[codes] * torch.exp2(exponents_ERG)[..., None]).flatten(2)
    packed = (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8)
    stored = {f"{name}_blocks": packed, f"{name}_scales": (exponents_ERG + 127).to(torch.uint8)}
    return stored, decoded_ERC.transpose(1, 2).bfloat16()


@dataclass(frozen=True)
class Source:
    """A kind of quantized source: which tensors of a model are encoded, and how.

    `encode` goes from a name and a weight to its stored tensors and to the weight that they stand for.
    """

    config: PretrainedConfig
    encoded: str  # a pattern of names
    encode: Callable[[str, Tensor], tuple[dict[str, Tensor], Tensor]]
    scheme: dict


LLAMA = LlamaConfig(**SIZES)
INT4_SCHEME = {
    "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
    "config_groups": {"group_0": INT4.model_dump(mode="json", exclude_none=True)},
}  # fmt: skip
SOURCES = {
    "int4": Source(LLAMA, r"_proj\.weight", to_int4, INT4_SCHEME | {"ignore": ["lm_head"]}),
    "fp8": Source(
        LLAMA, r"_proj\.weight", to_fp8,
        {"quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "dynamic", "fmt": "e4m3",
         "modules_to_not_convert": ["lm_head"]},
    ),
    "mxfp4 experts": Source(  # as gpt-oss
        GptOssConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2, sliding_window=16,
                     layer_types=["sliding_attention", "full_attention"]),
        r"experts\.(gate_up|down)_proj$", to_mxfp4,
        {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]},
    ),
    "int4 experts": Source(  # as Kimi K2
        DeepseekV3Config(**SIZES | {"head_dim": 8}, moe_intermediate_size=32, n_routed_experts=4, num_experts_per_tok=2,
                         n_group=1, topk_group=1, first_k_dense_replace=1, q_lora_rank=32, kv_lora_rank=32,
                         qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16),
        r"\.experts\.", to_int4,
        INT4_SCHEME | {"ignore": ["re:.*self_attn.*", "re:.*shared_experts.*", "re:.*layers.0.mlp.*", "lm_head"]},
    ),
}  # fmt: skip


def folders_of(source: Source, folder: Path) -> tuple[Path, Path]:
    """A model with some tensors encoded, and a plain copy of what they stand for."""
    model = tiny.save_model(folder / "model", source.config)
    encoded, plain = {}, {}
    for name, info in open_index(model).items():
        plain[name], stored = read_tensor(info), {name: read_tensor(info)}
        if re.search(source.encoded, name):
            stored, plain[name] = source.encode(name, plain[name])
        encoded |= stored
    for kind, tensors in {"encoded": encoded, "plain": plain}.items():
        shutil.copytree(model, folder / kind, ignore=shutil.ignore_patterns("*.safetensors", INDEX_FILE))
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / kind / "model.safetensors")
    config = json.loads((model / "config.json").read_text())
    config.get("text_config", config)["quantization_config"] = source.scheme
    (folder / "encoded" / "config.json").write_text(json.dumps(config))
    return folder / "encoded", folder / "plain"


@pytest.fixture(params=SOURCES)
def folders(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    return folders_of(SOURCES[request.param], tmp_path)


def check_same_results(found: Path, expected: Path) -> None:
    """Check that two runs have the same files, but for the records that name their sources' bytes."""
    files = result_files(found), result_files(expected)
    assert files[0].keys() == files[1].keys()
    others = [name for name in files[0] if files[0][name] != files[1][name]]
    assert all(name.endswith(("manifest.json", "ledger.jsonl", "README.md", "export.json")) for name in others), others


def test_a_run_is_that_of_the_plain_copy(folders: tuple[Path, Path], token_file: Path, tmp_path: Path, capsys):
    outputs = [tmp_path / f"from {source.name}" for source in folders]
    for source, output in zip(folders, outputs, strict=True):
        run_quantize(source, token_file, output, *RTN, "--quant.bits", 3, "--quant.ignore", "o_proj,re:.*down_proj")
        verify(parse("verify", [str(output)]), ONE_RANK)
    assert capsys.readouterr().out.count("are decoded as they are read") == 1
    check_same_results(*outputs)
    encoded, plain = (run_evaluate(source, token_file)["perplexity"] for source in folders)
    assert encoded == plain


def test_weights_are_those_that_transformers_loads(folders: tuple[Path, Path]):
    encoded, plain = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16) for folder in folders)
    source = open_checkpoint(folders[0])
    stored = {name: source.read(tensor) for name, tensor in source.tensors.items()}
    expected = {name: read_tensor(info) for name, info in open_index(folders[1]).items()}
    assert stored.keys() == expected.keys()
    assert [name for name, tensor in stored.items() if not torch.equal(tensor, expected[name])] == []
    with torch.inference_mode():  # compressed-tensors may decode as it runs
        assert torch.equal(encoded(TOKENS).logits, plain(TOKENS).logits)


@pytest.mark.slow
def test_experts_of_a_wrapper_whose_text_part_has_the_scheme(token_file: Path, tmp_path: Path):
    inner = SOURCES["int4 experts"]
    config = Kimi_K25Config(
        text_config=inner.config.to_dict(), projection_hidden_size=32, image_token_id=290, video_token_id=291,
        vision_start_token_id=292, vision_end_token_id=293, tie_word_embeddings=False,
        vision_config={"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
                       "patch_size": 14, "pos_emb_height": 4, "pos_emb_width": 4},
    )  # fmt: skip
    folders = folders_of(replace(inner, config=config), tmp_path)
    outputs = [tmp_path / f"from {source.name}" for source in folders]
    for source, output in zip(folders, outputs, strict=True):
        run_quantize(source, token_file, output, *RTN, "--quant.bits", 3)
    check_same_results(*outputs)
    assert "quantization_config" in json.loads((folders[0] / "config.json").read_text())["text_config"]
    written = json.loads((outputs[0] / "config.json").read_text())
    assert "quantization_config" not in written["text_config"]


@pytest.mark.slow
def test_training_redo_and_tuning_are_those_of_the_plain_copy(
    folders: tuple[Path, Path], token_file: Path, tmp_path: Path
):
    runs, tuned = ([tmp_path / f"{kind} {source.name}" for source in folders] for kind in ("run", "tuned"))
    for source, run, output in zip(folders, runs, tuned, strict=True):
        options = ("--optimize.iterations", 4, "--quant.bits", 3, "--export.formats", "hf")
        run_quantize(source, token_file, run, *options)
        run_quantize(source, token_file, run, *options, "--redo", "1", "--seed", 5)
        arguments = [run, "--model", source, "--output", output, "--tune.steps", 2, "--tune.batch_size", 2]
        tune(parse("tune", [str(argument) for argument in arguments]), ONE_RANK)
    check_same_results(*runs)
    check_same_results(*tuned)
