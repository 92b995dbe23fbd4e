"""Runs without calibration data: the same codes as with data where data do not matter, on any number of ranks."""

import json
from pathlib import Path

import pytest
import torch
from transformers import GptOssConfig, MixtralConfig

import forked
import tiny
from runs import LAUNCH, ONE_RANK, result_files, run_evaluate
from shardq.cli import parse
from shardq.commands.quantize import quantize
from shardq.commands.verify import verify
from shardq.errors import ConfigError, Stopped
from shardq.formats.block_file import read_block
from shardq.formats.tensor_file import read_tensors, write_tensors
from shardq.rundir.folder import RunFolder

SMALL = dict(vocab_size=211, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, head_dim=8)  # fmt: skip
MINMAX = ("--optimize.start", "minmax")
RECORDS = ("manifest.json", "ledger.jsonl", "README.md")  # say whether there were data, and how many ranks


@pytest.fixture(scope="module")
def models(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    stored_apart = tiny.save_model(folder / "mixtral", MixtralConfig(**SMALL))
    return {"dense": llama, "experts": stored_apart, "fused": tiny.save_model(folder / "oss", GptOssConfig(**SMALL))}


def arguments(model: Path, output: Path, *more: object) -> list[str]:
    fixed = ["--model", model, "--output", output, "--quant.method", "rtn", "--quant.group_size", 16]
    return [str(argument) for argument in (*fixed, *more)]


def run(model: Path, output: Path, *more: object, stop_after: int | None = None) -> dict:
    def seen(block: int | None) -> None:
        if block is not None and block == stop_after:
            RunFolder(output).stop.touch()

    return quantize(parse("quantize", arguments(model, output, *more)), ONE_RANK, seen)


def written(output: Path) -> dict[str, bytes]:
    return {name: content for name, content in result_files(output).items() if name not in RECORDS}


@pytest.mark.parametrize(
    ("kind", "checkpoint"), [("dense", "plain"), ("dense", "packed"), ("experts", "packed"), ("fused", "plain")]
)
def test_run_is_the_one_with_data_where_data_do_not_matter(models, token_file, tmp_path, kind, checkpoint):
    more = (*MINMAX, "--export.checkpoint", checkpoint)
    tokens = token_file if kind == "dense" else tiny.save_tokens(tmp_path / "tokens.safetensors", vocab=211)
    run(models[kind], tmp_path / "without", *more)
    run(models[kind], tmp_path / "with", *more, "--calib.dataset", tokens, "--calib.samples", 8,
        "--calib.sequence_length", 64)  # fmt: skip
    assert written(tmp_path / "without") == written(tmp_path / "with")


def test_ranks_share_the_blocks_and_a_run_goes_on(models, tmp_path):
    """Two ranks on three blocks: the last round is one rank's."""
    done = forked.ranks(2, [LAUNCH / "quantize.py", *arguments(models["experts"], tmp_path / "two")])
    assert done.returncode == 0, done.stderr
    with pytest.raises(Stopped):
        run(models["experts"], tmp_path / "one", stop_after=0)
    run(models["experts"], tmp_path / "one")
    assert written(tmp_path / "one") == written(tmp_path / "two")
    lines = [json.loads(line) for line in (tmp_path / "two" / "ledger.jsonl").read_text().splitlines()]
    source = {name for line in lines for name in line.get("source", {})}
    stored = {name for shard in models["experts"].glob("*.safetensors") for name in read_tensors(shard)}
    assert source == stored  # every byte of the source is known to the record
    verify(parse("verify", [str(tmp_path / "two")]), ONE_RANK)


def test_searched_start_has_less_error_in_every_group(models, tmp_path):
    run(models["dense"], tmp_path / "minmax", *MINMAX)
    run(models["dense"], tmp_path / "search")
    weights = {name: value.float() for shard in models["dense"].glob("*.safetensors")
               for name, value in read_tensors(shard).items()}  # fmt: skip
    gained = []
    for number in range(3):
        codes = [read_block(RunFolder(tmp_path / name).block(number)) for name in ("minmax", "search")]
        for name in codes[0]:
            former, found = ((of_run[name].dequantized() - weights[f"{name}.weight"]).square().unflatten(1, (-1, 16))
                             .sum(2) for of_run in codes)  # fmt: skip
            assert (found <= former * (1 + 1e-5)).all()
            gained.append((found.sum() / former.sum()).item())
    assert max(gained) < 0.98


def test_model_whose_own_code_cannot_run_is_quantized(models, tmp_path):
    """No block is computed, so weights that would make activations infinite do no harm."""
    folder = tmp_path / "model"
    folder.mkdir()
    for path in models["dense"].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    shard = next(path for path in sorted(folder.glob("*.safetensors")) if "model.norm.weight" in read_tensors(path))
    write_tensors(shard, read_tensors(shard) | {"model.norm.weight": torch.full((64,), 3e38, dtype=torch.bfloat16)})
    assert run(folder, tmp_path / "out")["blocks"] == 3


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--activations.bits", 8), "activations.bits: 8 is not allowed, it must be none without calibration data"),
        (("--calib.dataset", ""), "calib.dataset: an empty name"),
    ],
)
def test_what_needs_data_is_refused(models, tmp_path, more, said):
    with pytest.raises(ConfigError, match=said):
        run(models["dense"], tmp_path / "out", *more)


def test_result_is_evaluated(models, token_file, tmp_path):
    run(models["dense"], tmp_path / "out", "--quant.bits", 8)
    found = run_evaluate(tmp_path / "out", token_file)["perplexity"]
    assert found == pytest.approx(run_evaluate(models["dense"], token_file)["perplexity"], rel=0.02)
