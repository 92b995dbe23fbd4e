"""Mixtures of experts from end to end: packed as programs load them, resumed, done again, proved whole and tuned."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import tiny
from runs import ONE_RANK, result_files, run_evaluate, run_quantize
from shardq.cli import parse
from shardq.commands.export import export
from shardq.commands.tune import tune
from shardq.commands.verify import verify
from shardq.errors import ResumeError, Stopped
from shardq.export import checkpoint
from shardq.formats import block_file
from shardq.formats.shards import open_index
from shardq.model.skeleton import open_skeleton
from tests.families.tiny_config import FIRST_SPECIAL_TOKEN, tiny_config

RTN = ["--quant.method", "rtn", "--quant.bits", 4]


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> Path:
    return tiny.save_tokens(tmp_path_factory.mktemp("tokens") / "t.safetensors", 8, 64, vocab=FIRST_SPECIAL_TOKEN)


@pytest.fixture(scope="module")
def fused(tmp_path_factory) -> Path:
    """A model whose source stores experts fused, transposed, gate and up in turns, with biases. Read only."""
    return tiny.save_model(tmp_path_factory.mktemp("fused") / "model", tiny_config("gpt_oss"))


@pytest.fixture(scope="module")
def finished(fused: Path, tokens: Path, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("finished") / "out"
    run_quantize(fused, tokens, output, *RTN)
    return output


def save_fused_of_joined(folder: Path) -> Path:
    """A model whose experts transformers joins as it loads them, stored joined, as Qwen3.5's are published."""
    shard = tiny.save_model(folder, tiny_config("qwen3_moe"), max_shard_size="1GB") / "model.safetensors"
    tensors = load_file(shard)
    for number in range(tiny_config("qwen3_moe").num_hidden_layers):
        experts = f"model.layers.{number}.mlp.experts"
        gate, up, down = (
            torch.stack([tensors.pop(f"{experts}.{n}.{name}_proj.weight") for n in range(4)])
            for name in ("gate", "up", "down")
        )
        tensors |= {f"{experts}.gate_up_proj": torch.cat([gate, up], 1), f"{experts}.down_proj": down}
    save_file(tensors, shard, {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("mixtral", "block_sparse_moe.experts.3.w2"),
        pytest.param("qwen3_moe", "mlp.experts.3.down_proj", marks=pytest.mark.slow),
        pytest.param("deepseek_v3", "mlp.experts.3.down_proj", marks=pytest.mark.slow),
        pytest.param("glm4_moe", "mlp.experts.3.down_proj", marks=pytest.mark.slow),
    ],
)
def test_packed_experts_have_the_names_that_programs_load(tmp_path: Path, tokens: Path, family: str, name: str):
    output = tmp_path / "out"
    model = tiny.save_model(tmp_path / "model", tiny_config(family))
    run_quantize(model, tokens, output, *RTN, "--export.checkpoint", "packed")
    assert f"model.layers.1.{name}.weight_packed" in open_index(output)
    routers = {stored.removesuffix(".weight") for stored in open_index(model) if stored.endswith("gate.weight")}
    assert routers and routers <= set(json.loads((output / "config.json").read_text())["quantization_config"]["ignore"])
    loaded, info = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values())
    measured = math.log(run_evaluate(output, tokens)["perplexity"])
    tokens_NT = load_file(tokens)["tokens"]
    with torch.no_grad():
        logits_NTV = loaded.eval()(tokens_NT).logits[:, :-1].float()
    expected = torch.nn.functional.cross_entropy(logits_NTV.flatten(0, 1), tokens_NT[:, 1:].flatten()).item()
    assert math.isclose(expected, measured, rel_tol=1e-4)


def test_packed_experts_of_a_fused_source_are_read_again(finished: Path, fused: Path, tokens: Path, tmp_path: Path):
    export(
        parse("export", [str(finished), "--format", "compressed-tensors", "--output", str(tmp_path / "ct")]), ONE_RANK
    )
    assert "Transformers cannot load it: it joins no experts" in (tmp_path / "ct" / "README.md").read_text()
    stored = open_index(tmp_path / "ct")
    assert "model.layers.1.mlp.experts.3.gate_proj.weight_packed" in stored
    assert not any(name.endswith("experts.gate_up_proj") for name in stored)
    skeletons = [open_skeleton(folder) for folder in (tmp_path / "ct", finished)]
    name = "model.layers.1.mlp.experts.3.down_proj.weight"
    packed, plain = (skeleton.source.read(skeleton.tensor(name)) for skeleton in skeletons)
    assert torch.allclose(packed.float(), plain, rtol=1e-2)
    assert run_evaluate(tmp_path / "ct", tokens)["perplexity"] == pytest.approx(
        run_evaluate(finished, tokens)["perplexity"], rel=1e-2
    )


def test_result_has_the_layout_of_the_source(finished: Path, fused: Path):
    written, source = open_index(finished), open_index(fused)
    assert {name: info.shape for name, info in written.items()} == {name: info.shape for name, info in source.items()}
    verify(parse("verify", [str(finished)]), ONE_RANK)


def test_interrupted_run_comes_out_the_same(finished: Path, fused: Path, tokens: Path, tmp_path: Path):
    with pytest.raises(Stopped):
        run_quantize(fused, tokens, tmp_path / "out", *RTN, stop_after=0)
    run_quantize(fused, tokens, tmp_path / "out", *RTN)
    mine, expected = result_files(tmp_path / "out"), result_files(finished)
    assert mine.keys() == expected.keys()
    assert all(mine[name] == expected[name] for name in mine if name.endswith((".safetensors", ".encodings")))


def test_a_changed_expert_is_found_and_its_block_done_again(finished: Path, fused: Path, tokens: Path, tmp_path: Path):
    output = shutil.copytree(finished, tmp_path / "out")
    info = open_index(output)["model.layers.1.mlp.experts.down_proj"]
    with open(info.file, "r+b") as file:
        file.seek(info.offset + info.num_bytes // 2)
        file.write(b"\x00\x00\x80\x3f")
    with pytest.raises(ResumeError, match="weights"):
        verify(parse("verify", [str(output)]), ONE_RANK)
    run_quantize(fused, tokens, output, *RTN, "--redo", 1)
    verify(parse("verify", [str(output)]), ONE_RANK)


def test_changed_bytes_of_one_expert_stop_a_resume(fused: Path, tokens: Path, tmp_path: Path):
    model = shutil.copytree(fused, tmp_path / "model")
    with pytest.raises(Stopped):
        run_quantize(model, tokens, tmp_path / "out", *RTN, stop_after=0)
    info = open_index(model)["model.layers.0.mlp.experts.down_proj"]
    with open(info.file, "r+b") as file:
        file.seek(info.offset + 2 * 96 + 10)
        file.write(b"\x80\x3f")
    shutil.rmtree(tmp_path / "out" / "cache", ignore_errors=True)  # activations are computed again, from block 0
    with pytest.raises(Exception, match=r"experts\.down_proj\[\d+:\d+\] is not what it was when the run began"):
        run_quantize(model, tokens, tmp_path / "out", *RTN)


@pytest.mark.parametrize("form", ["plain", "packed"])
def test_a_large_block_is_written_in_the_memory_of_a_tensor(
    fused: Path, tokens: Path, tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
):
    model = fused if form == "plain" else save_fused_of_joined(tmp_path / "model")
    arguments = (*RTN, "--export.checkpoint", form, "--optimize.last_block", "output")
    run_quantize(model, tokens, tmp_path / "small", *arguments)
    for module in (block_file, checkpoint):
        monkeypatch.setattr(module, "LARGE_BYTES", 0)
    run_quantize(model, tokens, tmp_path / "large", *arguments)
    verify(parse("verify", [str(tmp_path / "large")]), ONE_RANK)
    if form == "packed":
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "large", output_loading_info=True)
        assert not any(loaded[1].values())
    small, large = (result_files(tmp_path / name) for name in ("small", "large"))
    names = [name for name in small if name.endswith(".safetensors")]
    assert len(names) > 6 and all(small[name] == large[name] for name in names)


@pytest.mark.slow
def test_scales_of_a_mixture_are_tuned(finished: Path, fused: Path, tokens: Path, tmp_path: Path):
    arguments = [finished, "--model", fused, "--output", tmp_path / "tuned", "--tune.steps", 2, "--tune.batch_size", 2]
    tune(parse("tune", list(map(str, arguments))), ONE_RANK)
    verify(parse("verify", [str(tmp_path / "tuned")]), ONE_RANK)
