"""A run whose own folder is the packed checkpoint that programs serve."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    CompressedTensorsConfig,
    GraniteMoeConfig,
    MixtralConfig,
    PretrainedConfig,
)

import tiny
from runs import ONE_RANK, result_files, run_evaluate, run_quantize
from shardq.cli import parse
from shardq.commands.export import export
from shardq.commands.quantize import quantize
from shardq.commands.tune import tune
from shardq.commands.verify import verify
from shardq.errors import ConfigError, ResumeError, Stopped
from shardq.formats.block_file import read_block
from shardq.rundir.folder import RunFolder

PACKED = ("--export.checkpoint", "packed", "--quant.group_size", 32, "--optimize.iterations", 4)
GRIDS = {
    "symmetric": (),
    "asymmetric": ("--quant.symmetric", "false"),
    "int8 activations": ("--quant.bits", 8, "--quant.group_size", -1, "--export.activation_bits", 8),
}


@pytest.fixture(scope="module", params=GRIDS)
def packed(request, llama: Path, token_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run. Read only."""
    output = tmp_path_factory.mktemp("packed") / "out"
    run_quantize(llama, token_file, output, *PACKED, *GRIDS[request.param])
    return output


@pytest.fixture(scope="module")
def symmetric(llama: Path, token_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run in groups of 32. Read only."""
    output = tmp_path_factory.mktemp("packed") / "out"
    run_quantize(llama, token_file, output, *PACKED)
    return output


def shards_of(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for path in sorted(folder.glob("model-*.safetensors")):
        yield from load_file(path).items()


def test_folder_loads_in_transformers_as_what_was_measured(packed: Path, token_file: Path):
    config = CompressedTensorsConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(packed, quantization_config=config, dtype=torch.float32)
    weights = model.state_dict()
    for number in range(3):
        for name, linear in read_block(RunFolder(packed).block(number)).items():
            assert torch.equal(linear.dequantized(torch.bfloat16).float(), weights[f"{name}.weight"].float())
    tokens_NT = load_file(token_file)["tokens"]
    with torch.no_grad():
        loss = sum(model.float()(input_ids=sample[None], labels=sample[None]).loss for sample in tokens_NT)
    assert run_evaluate(packed, token_file)["perplexity"] == pytest.approx((loss / len(tokens_NT)).exp().item(), 1e-4)


def test_folder_is_what_an_export_of_it_is_and_verifies(packed: Path, tmp_path: Path):
    verify(parse("verify", [str(packed)]), ONE_RANK)
    bits = "8" if json.loads((packed / "config.json").read_text())["quantization_config"]["format"][0] == "i" else "16"
    export(parse("export", [str(packed), "--output", str(tmp_path / "out"), "--activation_bits", bits]), ONE_RANK)
    for name, content in result_files(tmp_path / "out").items():
        if name.startswith(("model", "config")):
            assert (packed / name).read_bytes() == content, name


def test_blocks_take_a_third_of_the_source(symmetric: Path, llama: Path):
    """A matrix of 4 bits with a scale of 16 bits for 32 codes takes 4.5 bits of 16; norms stay as they are."""
    sizes = [
        sum(tensor.nbytes for name, tensor in shards_of(folder) if "layers" in name) for folder in (symmetric, llama)
    ]
    assert 0.28 < sizes[0] / sizes[1] < 0.34


def test_plain_weights_of_it_are_those_that_it_holds(symmetric: Path, token_file: Path, tmp_path: Path):
    folder = tmp_path / "hf"
    export(parse("export", [str(symmetric), "--format", "hf", "--dtype", "source", "--output", str(folder)]), ONE_RANK)
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    perplexities = [run_evaluate(path, token_file)["perplexity"] for path in (symmetric, folder)]
    assert perplexities[0] == perplexities[1]


def test_resumed_run_has_the_same_bytes(symmetric: Path, llama: Path, token_file: Path, tmp_path: Path):
    with pytest.raises(Stopped):
        run_quantize(llama, token_file, tmp_path / "out", *PACKED, "--cache.placement", "cpu", stop_after=0)
    run_quantize(llama, token_file, tmp_path / "out", *PACKED, "--cache.placement", "cpu")
    assert result_files(tmp_path / "out") == result_files(symmetric)


def test_run_does_not_go_on_in_the_other_form(symmetric: Path, llama: Path, token_file: Path):
    with pytest.raises(ResumeError, match=r"export.checkpoint \(was packed, is plain\)"):
        run_quantize(llama, token_file, symmetric, *PACKED, "--export.checkpoint", "plain")


def test_tuned_run_is_packed_too(symmetric: Path, llama: Path, tmp_path: Path):
    output = tmp_path / "tuned"
    steps = ["--tune.steps", "1", "--tune.batch_size", "2", "--tune.learning_rate", "0.05", "--output", str(output)]
    tune(parse("tune", [str(symmetric), "--model", str(llama), *steps]), ONE_RANK)
    verify(parse("verify", [str(output)]), ONE_RANK)
    before, after = (dict(shards_of(folder)) for folder in (symmetric, output))
    assert before.keys() == after.keys()
    changed = {name.rpartition(".")[2] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"weight_scale"}


def test_code_that_is_not_the_runs_is_found(symmetric: Path, tmp_path: Path):
    """Digests find any other byte; what decodes to other weights is found by the codes, too."""
    output = Path(shutil.copytree(symmetric, tmp_path / "out"))
    shard = output / "model-00002-of-00004.safetensors"
    tensors = load_file(shard)
    tensors["model.layers.1.mlp.up_proj.weight_packed"][3, 0] ^= 1
    save_file(tensors, shard, {"format": "pt"})
    with pytest.raises(ResumeError, match=r"damaged \(ledger, weights\)"):
        verify(parse("verify", [str(output)]), ONE_RANK)


def test_grid_without_a_packed_form_is_refused_by_name(llama: Path, token_file: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="3 bits are not supported"):
        run_quantize(llama, token_file, tmp_path / "out", *PACKED, "--quant.bits", 3)


def default_run(model: Path, token_file: Path, output: Path, *more: object) -> dict:
    """Quantize with the defaults of grid and checkpoint; give config.json."""
    fixed = ["--model", model, "--output", output, "--calib.dataset", token_file, "--calib.samples", 8]
    given = [*fixed, "--calib.sequence_length", 64, "--quant.method", "rtn", *more]
    quantize(parse("quantize", [str(argument) for argument in given]), ONE_RANK)
    return json.loads((output / "config.json").read_text())


@pytest.mark.parametrize(
    ("widths", "group_size"), [((128, 256), 128), ((64, 128), 64), ((64, 96), 32), ((48, 80), None)]
)
def test_default_grid_has_the_largest_groups_that_divide_every_width(
    widths: tuple[int, int], group_size: int | None, token_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    hidden, inner = widths
    model = tiny.save_llama(tmp_path / "model", num_blocks=1, hidden=hidden, intermediate_size=inner)
    scheme = default_run(model, token_file, tmp_path / "out")["quantization_config"]
    assert scheme["config_groups"]["group_0"]["weights"].get("group_size") == group_size
    said = capsys.readouterr().out
    kind = {128: "", 64: "groups of 64", 32: "groups of 32", None: "per-channel"}[group_size]
    assert (f"grid: {kind}, as 128 does not divide every width of the model" in said) == bool(kind)
    assert ("vLLM's kernels need a multiple of 32" in said) == (inner == 80) != (f"vllm serve {tmp_path}" in said)


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["--quant.bits", 3], "3 bits are not supported, only 4 and 8"),
        (["--quant.decompressed_bits", 8], "whole multiples"),
        (
            ["--export.activation_bits", 8, "--quant.symmetric", "false"],
            "int8 activations need a symmetric weight grid",
        ),
    ],
    ids=["three bits", "two-level scales", "zero points beside int8"],
)
def test_grid_without_a_packed_form_has_plain_weights_by_default_and_says_why(
    llama: Path, token_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture, more: list, reason: str
):
    assert "quantization_config" not in default_run(llama, token_file, tmp_path / "out", *more)
    assert re.search(rf"checkpoint: plain weights \(.*{reason}", capsys.readouterr().out)


def save_mixture(folder: Path, kind: type[PretrainedConfig]) -> Path:
    """A tiny mixture of four experts."""
    config = kind(
        vocab_size=300, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    return tiny.save_model(folder, config)


def test_experts_that_are_stored_one_by_one_are_packed(token_file: Path, tmp_path: Path):
    default_run(save_mixture(tmp_path / "model", MixtralConfig), token_file, tmp_path / "out")
    names = dict(shards_of(tmp_path / "out"))
    assert "model.layers.1.block_sparse_moe.experts.3.w2.weight_packed" in names
    verify(parse("verify", [str(tmp_path / "out")]), ONE_RANK)


def test_experts_that_are_stored_together_stay_plain(token_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    model = save_mixture(tmp_path / "model", GraniteMoeConfig)
    assert "quantization_config" not in default_run(model, token_file, tmp_path / "out")
    assert "checkpoint: plain weights (packed has no place for codes of model.layers.0." in capsys.readouterr().out
    with pytest.raises(ConfigError, match="export.checkpoint: packed has no place .*; choose plain"):
        default_run(model, token_file, tmp_path / "other", "--export.checkpoint", "packed")


def test_the_folder_has_a_card_whose_recipe_makes_it_again(symmetric: Path, tmp_path: Path):
    card = (symmetric / "README.md").read_text()
    assert "vllm serve" in card and "# W4A16, symmetric" in card and str(tmp_path.parent) not in card
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(re.search(r"```yaml\n(.*?)```", card, re.DOTALL).group(1))
    config = parse("quantize", ["--model", "model", "--config", str(recipe)])
    assert (config.quant.group_size, config.export.checkpoint) == (32, "packed")


def test_encodings_are_written_on_request_alone(symmetric: Path, tmp_path: Path):
    """In groups they may be larger than the packed weights."""
    assert not list(symmetric.rglob("*encodings*"))
    export(parse("export", [str(symmetric), "--format", "aimet", "--output", str(tmp_path / "out")]), ONE_RANK)
    assert (tmp_path / "out" / "model.encodings").is_file()
