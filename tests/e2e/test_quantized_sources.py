"""Runs from sources whose weights are stored quantized: the same as runs from plain copies of what they decode to."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from runs import ONE_RANK, result_files, run_evaluate, run_quantize
from shardq.cli import parse
from shardq.commands.tune import tune
from shardq.commands.verify import verify
from shardq.formats.quantized_source import open_checkpoint
from shardq.formats.shards import INDEX_FILE, open_index, read_tensor

Encode = Callable[[Tensor], tuple[dict[str, Tensor], Tensor]]
"""From a weight to its stored tensors, by what follows the linear's name, and to the weight that they stand for."""

TOKENS = torch.arange(3, 51).view(2, 24)
INT4 = QuantizationScheme(
    targets=["Linear"], weights=QuantizationArgs(num_bits=4, group_size=32, strategy="group"), format="pack-quantized"
)


def to_int4(weight_OI: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    scale_OG = (weight_OI.float().unflatten(1, (-1, 32)).abs().amax(2) / 7).bfloat16()
    stored = compressor.compress({"weight": weight_OI, "weight_scale": scale_OG}, INT4)
    decoded = compressor.decompress(dict(stored), INT4)["weight"]
    return stored | {"input_scale": torch.ones(1)}, decoded


def to_fp8(weight_OI: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    scale_GH = weight_OI.float().unflatten(1, (-1, 32)).unflatten(0, (-1, 32)).abs().amax((1, 3)) / 448
    scale_OI = scale_GH.repeat_interleave(32, 0).repeat_interleave(32, 1)
    codes_OI = (weight_OI / scale_OI).to(torch.float8_e4m3fn)
    return {"weight": codes_OI, "weight_scale_inv": scale_GH}, (codes_OI.float() * scale_OI).bfloat16()


SOURCES: dict[str, tuple[Encode, dict]] = {
    "compressed-tensors int4": (
        to_int4,
        {"quant_method": "compressed-tensors", "format": "pack-quantized",
         "quantization_status": "compressed", "ignore": ["lm_head"],
         "config_groups": {"group_0": INT4.model_dump(mode="json", exclude_none=True)}},
    ),
    "fp8": (
        to_fp8,
        {"quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "dynamic", "fmt": "e4m3",
         "modules_to_not_convert": ["lm_head"]},
    ),
}  # fmt: skip


def folders_of(model: Path, folder: Path, encode: Encode, scheme: dict) -> tuple[Path, Path]:
    """A model with the matrices of its blocks encoded, and a plain copy of what they stand for."""
    encoded, plain = {}, {}
    for name, info in open_index(model).items():
        tensor = read_tensor(info)
        encoded[name] = plain[name] = tensor
        if ".layers." in name and tensor.dim() == 2:
            stored, plain[name] = encode(tensor)
            del encoded[name]
            encoded |= {f"{name.removesuffix('weight')}{part}": value for part, value in stored.items()}
    for kind, tensors in {"encoded": encoded, "plain": plain}.items():
        shutil.copytree(model, folder / kind, ignore=shutil.ignore_patterns("*.safetensors", INDEX_FILE))
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / kind / "model.safetensors")
    config = json.loads((model / "config.json").read_text()) | {"quantization_config": scheme}
    (folder / "encoded" / "config.json").write_text(json.dumps(config))
    return folder / "encoded", folder / "plain"


@pytest.fixture(params=SOURCES)
def folders(request: pytest.FixtureRequest, llama: Path, tmp_path: Path) -> tuple[Path, Path]:
    return folders_of(llama, tmp_path, *SOURCES[request.param])


def check_same_results(found: Path, expected: Path) -> None:
    """Check that two runs have the same files, but for the records that name their sources' bytes."""
    files = result_files(found), result_files(expected)
    assert files[0].keys() == files[1].keys()
    others = [name for name in files[0] if files[0][name] != files[1][name]]
    assert all(name.endswith(("manifest.json", "ledger.jsonl", "README.md", "export.json")) for name in others), others


def test_a_run_is_that_of_the_plain_copy(folders: tuple[Path, Path], token_file: Path, tmp_path: Path, capsys):
    outputs = [tmp_path / f"from {source.name}" for source in folders]
    for source, output in zip(folders, outputs, strict=True):
        run_quantize(source, token_file, output, "--optimize.iterations", 4, "--quant.bits", 3,
                     "--quant.ignore", "v_proj", "--export.formats", "gptq")  # fmt: skip
        verify(parse("verify", [str(output)]), ONE_RANK)
    assert capsys.readouterr().out.count("are decoded as they are read") == 1
    check_same_results(*outputs)
    encoded, plain = (run_evaluate(source, token_file)["perplexity"] for source in folders)
    assert encoded == plain


def test_weights_are_those_that_transformers_loads(folders: tuple[Path, Path]):
    encoded, plain = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16) for folder in folders)
    source = open_checkpoint(folders[0])
    for name, parameter in plain.named_parameters():
        assert torch.equal(source.read(source.tensors[name]), parameter)
    with torch.inference_mode():  # compressed-tensors decodes as it runs
        assert torch.equal(encoded(TOKENS).logits, plain(TOKENS).logits)


@pytest.mark.slow
def test_redo_and_tuning_are_those_of_the_plain_copy(folders: tuple[Path, Path], token_file: Path, tmp_path: Path):
    runs, tuned = ([tmp_path / f"{kind} {source.name}" for source in folders] for kind in ("run", "tuned"))
    for source, run, output in zip(folders, runs, tuned, strict=True):
        options = ("--optimize.iterations", 4, "--quant.bits", 3)
        run_quantize(source, token_file, run, *options)
        run_quantize(source, token_file, run, *options, "--redo", "1", "--seed", 5)
        arguments = [run, "--model", source, "--output", output, "--tune.steps", 2, "--tune.batch_size", 2]
        tune(parse("tune", [str(argument) for argument in arguments]), ONE_RANK)
    check_same_results(*runs)
    check_same_results(*tuned)
