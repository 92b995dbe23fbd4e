"""Finished runs in other formats, loaded by the programs that those are for."""

import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from runs import ONE_RANK, result_files, run_evaluate, run_quantize
from shardq.cli import parse
from shardq.commands.export import export
from shardq.commands.verify import verify
from shardq.errors import ConfigError, ResumeError
from shardq.formats import encodings
from shardq.formats.block_file import read_activations, read_block
from shardq.formats.quantized_source import open_checkpoint
from shardq.formats.shards import open_index, read_tensor
from shardq.quant.activation import rounded
from shardq.rundir.folder import RunFolder

RTN = ("--quant.method", "rtn")
TOKENS = torch.arange(3, 51).view(2, 24)


@pytest.fixture(scope="module")
def served(llama: Path, token_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run for vLLM, 4 bits per-channel, with its compressed-tensors checkpoint. Read only."""
    output = tmp_path_factory.mktemp("served") / "out"
    run_quantize(llama, token_file, output, "--target", "vllm", "--export.formats", "compressed-tensors",
                 "--optimize.iterations", 4)  # fmt: skip
    return output


def run_export(run: Path, *more: object) -> dict:
    return export(parse("export", [str(argument) for argument in (run, *more)]), ONE_RANK)


@torch.inference_mode()
def logits(folder: Path, **options: object) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()(TOKENS).logits


def test_a_run_for_vllm_is_served_bit_for_bit(served: Path):
    found = logits(served / "compressed-tensors")
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, logits(served, dtype=torch.bfloat16))


def test_an_export_is_evaluated_as_it_is_served(
    served: Path, token_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    assert run_export(served, "--format", "gptq", "--output", tmp_path / "gptq")["scale_change"] == 0
    folders = (served, served / "compressed-tensors", tmp_path / "gptq")
    found = [run_evaluate(folder, token_file)["perplexity"] for folder in folders]
    assert found[1] == found[2]
    # The run keeps weights in float32. An export's are products in bfloat16, the dtype of its scales.
    run, exports = open_checkpoint(served), [open_checkpoint(folder) for folder in folders[1:]]
    for source in exports:
        for name, tensor in run.tensors.items():
            assert torch.equal(source.read(source.tensors[name]), run.read(tensor).bfloat16()), name
    assert found[0] == pytest.approx(found[1], rel=1e-3)
    assert "only" not in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(served / "compressed-tensors").eval()
    tokens_NT = load_file(token_file)["tokens"].long()
    with torch.inference_mode():
        losses = [model(tokens_T[None], labels=tokens_T[None]).loss.float() for tokens_T in tokens_NT]
    assert found[1] == pytest.approx(torch.stack(losses).mean().exp().item(), rel=5e-3)


def test_scales_are_rounded_before_codes_are_made(served: Path):
    index = open_index(served / "compressed-tensors")
    for path in sorted((served / "blocks").iterdir()):
        for name, linear in read_block(path).items():
            assert linear.grid.scale_dtype == "bfloat16"
            assert torch.equal(linear.scale_OG, linear.scale_OG.bfloat16().float())
            with safe_open(index[f"{name}.weight_scale"].file, "pt") as file:
                assert torch.equal(file.get_tensor(f"{name}.weight_scale").float(), linear.scale_OG)


GRIDS = [
    ("--quant.bits", 4, "--quant.group_size", 32),
    ("--quant.bits", 4, "--quant.symmetric", "false"),
    ("--quant.bits", 4, "--quant.symmetric", "false", "--quant.group_size", 32),
    ("--quant.bits", 4, "--quant.full_range", "false"),
    ("--quant.bits", 8),
]


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: " ".join(map(str, grid)))
def test_every_grid_loads_as_the_run_that_it_is_from(llama: Path, token_file: Path, tmp_path: Path, grid: tuple):
    run = tmp_path / "run"
    run_quantize(llama, token_file, run, *RTN, "--target", "vllm", *grid)
    assert run_export(run)["scale_change"] == 0
    # Left packed, transformers makes room for unpacked zero points only.
    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if "--quant.symmetric" in grid else {}
    assert torch.equal(logits(run / "compressed-tensors", **options), logits(run, dtype=torch.bfloat16))


def test_int8_activations_are_rounded_token_by_token(llama: Path, token_file: Path, tmp_path: Path):
    run = tmp_path / "run"
    run_quantize(llama, token_file, run, *RTN, "--target", "vllm", "--quant.bits", 8)
    run_export(run, "--activation_bits", 8)
    model = AutoModelForCausalLM.from_pretrained(run, dtype=torch.bfloat16).eval()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.register_forward_pre_hook(rounded_by_token)
    with torch.inference_mode():
        expected = model(TOKENS).logits
    assert torch.equal(logits(run / "compressed-tensors"), expected)
    assert not torch.equal(logits(run, dtype=torch.bfloat16), expected)


def rounded_by_token(module: torch.nn.Module, inputs: tuple) -> torch.Tensor:
    scale = inputs[0].abs().amax(-1, keepdim=True) / 127.5
    return (inputs[0] / scale).round().clamp(-128, 127) * scale


@pytest.mark.parametrize(
    "grid", [("--quant.full_range", "false"), ("--quant.group_size", 32, "--quant.decompressed_bits", 8)]
)
def test_scales_of_a_run_without_a_target_are_rounded_on_the_way(
    llama: Path, token_file: Path, tmp_path: Path, grid: tuple
):
    run = tmp_path / "run"
    run_quantize(llama, token_file, run, *RTN, *grid)
    summary = run_export(run, "--output", tmp_path / "exported")
    scales = [linear.scale_OG for path in (run / "blocks").iterdir() for linear in read_block(path).values()]
    changes = [(scale.bfloat16().double() / scale.double() - 1).abs().max().item() for scale in scales]
    assert summary["scale_change"] == pytest.approx(max(changes), rel=1e-3)
    assert 0 < summary["scale_change"] < 2**-8


def test_hf_export_holds_the_runs_weights(served: Path, tmp_path: Path):
    summary = run_export(served, "--format", "hf", "--output", tmp_path / "exact")
    assert torch.equal(logits(tmp_path / "exact", dtype=torch.float32), logits(served, dtype=torch.float32))
    run_export(served, "--format", "hf", "--output", tmp_path / "half", "--dtype", "source")
    assert {info.dtype for info in open_index(tmp_path / "half").values()} == {"BF16"}
    assert torch.equal(logits(tmp_path / "half"), logits(served, dtype=torch.bfloat16))
    assert summary["scale_change"] == 0


def test_the_model_card_gives_the_run_s_recipe_and_how_to_load(served: Path):
    card = (served / "compressed-tensors" / "README.md").read_text()
    assert "# W4A16, symmetric, per-channel" in card and "vllm serve" in card
    recipe = served.parent / "recipe.yaml"
    recipe.write_text(re.search(r"```yaml\n(.*?)```", card, re.DOTALL).group(1))
    config = parse("quantize", ["--model", "model", "--config", str(recipe)])
    stored = json.loads((served / "manifest.json").read_text())["options"]
    assert json.loads(json.dumps(asdict(config)))["optimize"] == stored["optimize"] | {"memory_gib": None}
    assert (config.target, config.quant.bits) == ("vllm", 4)


def test_export_later_is_the_export_of_the_run(served: Path, tmp_path: Path):
    run_export(served, "--output", tmp_path / "later")
    earlier = sorted((served / "compressed-tensors").iterdir())
    assert [path.name for path in earlier] == sorted(path.name for path in (tmp_path / "later").iterdir())
    assert all(path.read_bytes() == (tmp_path / "later" / path.name).read_bytes() for path in earlier)


def gptq_weight(folder: Path, name: str) -> torch.Tensor:
    """The weight [O, I] of a GPTQ checkpoint of 4 or 8 bits, by the format's description."""
    index, config = open_index(folder), json.loads((folder / "config.json").read_text())["quantization_config"]
    bits, shifts = config["bits"], torch.arange(0, 32, config["bits"])
    kinds = ("qweight", "qzeros", "scales", "g_idx")
    qweight, qzeros, scales, g_idx = (read_tensor(index[f"{name}.{kind}"]) for kind in kinds)
    codes = (qweight[:, None, :] >> shifts[:, None]) % 2**bits  # [I / codes in a word, codes in a word, O]
    zero_points = ((qzeros[:, :, None] >> shifts) % 2**bits).flatten(1) + (config["checkpoint_format"] == "gptq")
    groups = g_idx.long()
    return ((codes.flatten(0, 1) - zero_points[groups]) * scales[groups].float()).T


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: " ".join(map(str, grid)))
def test_gptq_holds_the_runs_weights(llama: Path, token_file: Path, tmp_path: Path, grid: tuple):
    run = tmp_path / "run"
    run_quantize(llama, token_file, run, *RTN, "--target", "vllm", *grid)
    assert run_export(run, "--format", "gptq")["scale_change"] == 0
    source, written = open_index(run), open_index(run / "gptq")
    linears = {name for path in (run / "blocks").iterdir() for name in read_block(path)}
    for name, info in source.items():
        linear = name.removesuffix(".weight")
        weight = gptq_weight(run / "gptq", linear) if linear in linears else read_tensor(written[name])
        assert torch.equal(weight, read_tensor(info)), name
    assert len(written) == len(source) + 3 * len(linears)
    card = (run / "gptq" / "README.md").read_text()
    assert ("vllm serve" in card) == ("--quant.symmetric" not in grid)


@pytest.mark.parametrize("version", ["0.6.1", "1.0.0", "2.0.0", "2.1.0"])
def test_aimet_export_describes_the_runs_weights(served: Path, tmp_path: Path, version: str):
    run_export(served, "--format", "aimet", "--aimet.version", version, "--output", tmp_path / "aimet")
    expected = []
    for number, path in enumerate(sorted((served / "blocks").iterdir())):
        of_block = [encodings.item_of(version, f"{name}.weight", linear) for name, linear in read_block(path).items()]
        assert list(encodings.read(RunFolder(tmp_path / "aimet").encodings(version, number), version)) == of_block
        expected += of_block
    whole = RunFolder(tmp_path / "aimet").encodings(version)
    assert list(encodings.read(whole, version)) == expected and len(expected) == 21
    if version in ("0.6.1", "1.0.0"):  # which the run itself writes
        of_run = sorted(encodings.read(RunFolder(served).encodings(version), version), key=json.dumps)
        assert sorted(expected, key=json.dumps) == of_run
    assert "load_encodings" in (tmp_path / "aimet" / "README.md").read_text()


def test_encodings_that_no_program_could_load_are_not_written(
    llama: Path, token_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    run, per_group = tmp_path / "run", ("--quant.group_size", 32)
    monkeypatch.setattr(encodings, "LARGEST_BYTES", 200_000)  # 3456 scales: 553 and 90 kB
    run_quantize(llama, token_file, run, *RTN, *per_group)
    assert "no AIMET encodings of version 0.6.1: 3456 scales" in capsys.readouterr().out
    assert not list(run.rglob("*_torch*")) and (run / "model.encodings").exists()
    assert verify(parse("verify", [str(run)]), ONE_RANK)["linears"] == 21
    with pytest.raises(
        ConfigError, match=r"0\.6\.1: 3456 scales would make about 0\.0 GB.*choose --aimet.version 1\.0"
    ):
        run_export(run, "--format", "aimet", "--aimet.version", "0.6.1")
    asked = ("--export.formats", "aimet", "--export.aimet.version", "0.6.1")
    with pytest.raises(ConfigError, match=r"aimet\.version: 0\.6\.1"):
        run_quantize(llama, token_file, tmp_path / "other", *RTN, *per_group, *asked)


def test_a_run_writes_every_format_that_it_is_asked_for(llama: Path, token_file: Path, tmp_path: Path):
    formats = ("--export.formats", "[gptq,aimet,hf]", "--export.aimet.version", "2.1.0", "--export.activation_bits", 8)
    run_quantize(llama, token_file, tmp_path / "run", *RTN, *formats)
    assert json.loads((tmp_path / "run/aimet/model.encodings").read_text())["version"] == "2.1.0"
    cards = [(tmp_path / "run" / chosen / "README.md").read_text() for chosen in ("gptq", "aimet", "hf")]
    assert all("# W4A16, symmetric, per-channel" in card for card in cards)


def test_linears_left_as_they_are_are_ignored_and_kept(llama: Path, token_file: Path, tmp_path: Path):
    run = tmp_path / "run"
    run_quantize(llama, token_file, run, *RTN, "--target", "vllm", "--quant.ignore", "*.down_proj")
    run_export(run)
    config = json.loads((run / "compressed-tensors" / "config.json").read_text())
    left = [f"model.layers.{number}.mlp.down_proj" for number in range(3)]
    assert set(config["quantization_config"]["ignore"]) >= {"lm_head", *left}
    assert torch.equal(logits(run / "compressed-tensors"), logits(run, dtype=torch.bfloat16))


def test_matrices_that_transformers_builds_nothing_of_are_named_as_float(llama: Path, token_file: Path, tmp_path: Path):
    """Of layers that predict further tokens, in their two places: vLLM, which builds them, looks them up by name."""
    model, run = shutil.copytree(llama, tmp_path / "model"), tmp_path / "run"
    layers = ("mtp.layers.0", "model.layers.3")
    parts = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj", "eh_proj")
    further = {f"{layer}.{part}.weight": torch.ones(64, 64) for layer in layers for part in parts}
    save_file(further | {"mtp.norm.weight": torch.ones(64)}, model / "further.safetensors")
    index = json.loads((model / "model.safetensors.index.json").read_text())
    index["weight_map"] |= dict.fromkeys((*further, "mtp.norm.weight"), "further.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    run_quantize(model, token_file, run, *RTN, "--target", "vllm", "--export.formats", "[compressed-tensors,gptq]",
                 "--quant.ignore", "*.down_proj")  # fmt: skip
    config = {kind: json.loads((run / kind / "config.json").read_text())["quantization_config"]
              for kind in ("compressed-tensors", "gptq")}  # fmt: skip
    left = {name.removesuffix(".weight") for name in further} | {"lm_head"}
    left |= {f"model.layers.{number}.mlp.down_proj" for number in range(3)}
    assert set(config["compressed-tensors"]["ignore"]) == left

    def is_left(name: str) -> bool:
        return any(re.match(pattern.removeprefix("-:"), name) for pattern in config["gptq"]["dynamic"])

    fused = {f"{layer}.{name}" for layer in layers for name in ("self_attn.qkv_proj", "mlp.gate_up_proj")}
    assert all(is_left(name) for name in left | fused)
    quantized = {name for path in (run / "blocks").iterdir() for name in read_block(path)}
    assert not any(is_left(name) for name in quantized | {"model.layers.0.self_attn.qkv_proj", "mtp.norm"})


def test_what_cannot_be_exported_is_refused(served: Path, llama: Path, token_file: Path, tmp_path: Path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.txt").write_text("words")
    with pytest.raises(ConfigError, match="not an empty folder, nor one that holds an export"):
        run_export(served, "--output", tmp_path / "thesis")
    assert (tmp_path / "thesis" / "thesis.txt").read_text() == "words"
    with pytest.raises(ConfigError, match=r"holds an export to compressed-tensors \(activation_bits 16\)"):
        run_export(served, "--activation_bits", 8)
    with pytest.raises(ResumeError, match="holds no run of shardq"):
        run_export(llama)
    with pytest.raises(ConfigError, match="pickle"):
        run_export(served, "--format", "pickle")
    with pytest.raises(ConfigError, match="activation_bits: 8"):
        run_export(served, "--format", "hf", "--activation_bits", 8)
    with pytest.raises(ConfigError, match="dtype: source"):
        run_export(served, "--dtype", "source")
    with pytest.raises(ConfigError, match="aimet.version: 2.0.0"):
        run_export(served, "--aimet.version", "2.0.0")
    run_quantize(llama, token_file, tmp_path / "w3", *RTN, "--quant.bits", 3)
    with pytest.raises(ConfigError, match="3 bits"):
        run_export(tmp_path / "w3")
    assert not (tmp_path / "w3" / "compressed-tensors").exists(), "what was refused has left something"


class TestAgain:
    """The same command a second time."""

    @pytest.fixture
    def run(self, served: Path, tmp_path: Path) -> Path:
        return shutil.copytree(served, tmp_path / "run")

    def test_a_finished_export_is_left_as_it_is(self, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
        first = run_export(run, "--format", "hf", "--output", tmp_path / "hf")
        times = {path: path.stat().st_mtime_ns for path in (tmp_path / "hf").iterdir()}
        again = run_export(run, "--format", "hf", "--output", tmp_path / "hf")
        assert again | {"seconds": 0} == first | {"seconds": 0}
        assert f"{tmp_path}/hf: this export is finished, nothing is left to do" in capsys.readouterr().out
        assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "hf").iterdir()}

    def test_an_export_is_uploaded_once_it_is_whole_and_refused_before_it_is_begun(
        self, run: Path, monkeypatch: pytest.MonkeyPatch
    ):
        uploads = []
        monkeypatch.setenv("HF_TOKEN", "hf_one")
        monkeypatch.setattr("shardq.commands.export.push", lambda *given: uploads.append(given[:3]) or "address")
        for _ in range(2):  # the second time nothing is left to do but the upload
            assert run_export(run, "--push_to_hub", "owner/model", "--private", "true")["address"] == "address"
        assert uploads == [(run / "compressed-tensors", "owner/model", True)] * 2
        with pytest.raises(ConfigError, match="push_to_hub: model names no owner"):
            run_export(run, "--format", "hf", "--push_to_hub", "model")
        assert not (run / "hf").exists()

    @pytest.mark.parametrize("damage", ["missing", "short"])
    def test_what_is_missing_or_short_is_written_again(self, run: Path, capsys: pytest.CaptureFixture, damage: str):
        folder = run / "compressed-tensors"
        before = result_files(folder)
        shard = folder / "model-00002-of-00004.safetensors"
        shard.unlink() if damage == "missing" else shard.write_bytes(shard.read_bytes()[:-1])
        run_export(run)
        assert re.search(rf"{shard}: (missing|changed).*; exported again", capsys.readouterr().out)
        assert result_files(folder) == before

    def test_a_run_writes_a_short_export_again(
        self, run: Path, llama: Path, token_file: Path, capsys: pytest.CaptureFixture
    ):
        before = result_files(run)
        (run / "compressed-tensors" / "config.json").unlink()
        (run / "gptq").mkdir()
        run_quantize(llama, token_file, run, "--target", "vllm", "--export.formats", "compressed-tensors",
                     "--optimize.iterations", 4)  # fmt: skip
        assert result_files(run) == before
        assert "config.json: missing although it was finished; written anew" in capsys.readouterr().out

    def test_an_export_of_a_run_that_has_changed_is_made_anew(
        self, run: Path, llama: Path, token_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture
    ):
        run_export(run, "--output", tmp_path / "out")
        run_quantize(llama, token_file, run, "--target", "vllm", "--redo", "0-2", "--optimize.iterations", 2)
        run_export(run, "--output", tmp_path / "out")
        assert f"{tmp_path}/out: the run has changed since it was exported; exported again" in capsys.readouterr().out
        run_export(run, "--output", tmp_path / "other")
        assert result_files(tmp_path / "out") == result_files(tmp_path / "other")

    def test_a_damaged_record_is_named(self, run: Path):
        record = run / "compressed-tensors" / "shardq-export.json"
        record.write_text(record.read_text().replace('"activation_bits": 16', '"activation_bits": 17'))
        with pytest.raises(ResumeError, match="shardq-export.json: damaged .*export again"):
            run_export(run)


@pytest.mark.parametrize("symmetric", ["true", "false"])
@pytest.mark.parametrize("granularity", ["tensor", "token"])
def test_int8_activations_are_rounded_to_the_runs_grids(
    llama: Path, token_file: Path, tmp_path: Path, granularity: str, symmetric: str
):
    run = tmp_path / "run"
    run_quantize(llama, token_file, run, *RTN, "--target", "vllm", "--quant.bits", 8, "--activations.bits", 8,
                 "--activations.granularity", granularity, "--activations.symmetric", symmetric)  # fmt: skip
    run_export(run, "--activation_bits", 8)
    grids = {name: grid for path in (run / "blocks").iterdir() for name, grid in read_activations(path).items()}
    dtype = torch.float32  # in bfloat16 the library rounds the quotients, too
    model = AutoModelForCausalLM.from_pretrained(run, dtype=dtype).eval()
    for name, grid in grids.items():
        module = model.get_submodule(name.removesuffix(".input"))
        module.register_forward_pre_hook(lambda module, inputs, grid=grid: rounded(inputs[0], grid))
    assert len(grids) == 21
    with torch.inference_mode():
        expected = model(TOKENS).logits
    assert torch.equal(logits(run / "compressed-tensors", dtype=dtype), expected)
    assert not torch.equal(logits(run, dtype=dtype), expected)
    stored = {name for name in open_index(run / "compressed-tensors") if "input" in name.rpartition(".")[2]}
    kinds = {"tensor": {"input_scale"}, "token": set()}[granularity]
    assert {name.rpartition(".")[2] for name in stored} == kinds | (
        {"input_zero_point"} if kinds and symmetric == "false" else set()
    )


def test_activations_of_other_widths_are_not_exported_as_int8(llama: Path, token_file: Path, tmp_path: Path):
    run = tmp_path / "run"
    run_quantize(llama, token_file, run, *RTN, "--quant.bits", 8, "--activations.bits", 16)
    with pytest.raises(ConfigError, match="activation_bits: 8, but the run has grids of 16 bits"):
        run_export(run, "--activation_bits", 8)


def test_grids_of_keys_and_values_are_left_out(
    llama: Path, token_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    run = tmp_path / "run"
    with pytest.raises(ConfigError, match="activations.kv_bits: vLLM takes no integer grids"):
        run_quantize(llama, token_file, run, *RTN, "--activations.kv_bits", 8, "--target", "vllm")
    run_quantize(llama, token_file, run, *RTN, "--activations.kv_bits", 8)
    run_export(run)
    assert f"{run}/compressed-tensors: without the run's grids of keys and values" in capsys.readouterr().out
    assert "kv_cache_scheme" not in (run / "compressed-tensors" / "config.json").read_text()
