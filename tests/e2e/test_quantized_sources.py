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

from runs import ONE_RANK, result_files, run_evaluate, run_quantize
from shardq.cli import parse
from shardq.commands.verify import verify
from shardq.formats.shards import INDEX_FILE, open_index, read_tensor

Encode = Callable[[Tensor], tuple[dict[str, Tensor], Tensor]]
"""From a weight to its stored tensors, by what follows the linear's name, and to the weight that they stand for."""

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
    """In blocks of 48 x 48, which cut those at the edges."""
    size = [-(-count // 48) for count in weight_OI.shape]
    padded = torch.zeros(size[0] * 48, size[1] * 48)
    padded[: weight_OI.shape[0], : weight_OI.shape[1]] = weight_OI
    scale_GH = padded.view(size[0], 48, size[1], 48).abs().amax((1, 3)) / 448
    scale_OI = scale_GH.repeat_interleave(48, 0).repeat_interleave(48, 1)[: weight_OI.shape[0], : weight_OI.shape[1]]
    codes_OI = (weight_OI / scale_OI).to(torch.float8_e4m3fn)
    return {"weight": codes_OI, "weight_scale_inv": scale_GH}, (codes_OI.float() * scale_OI).bfloat16()


SOURCES: dict[str, tuple[Encode, dict]] = {
    "compressed-tensors int4": (
        to_int4,
        {"quant_method": "compressed-tensors", "format": "pack-quantized",
         "config_groups": {"group_0": INT4.model_dump(mode="json", exclude_none=True)}},
    ),
    "fp8": (
        to_fp8,
        {"quant_method": "fp8", "weight_block_size": [48, 48], "activation_scheme": "dynamic", "fmt": "e4m3",
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


@pytest.mark.parametrize("kind", SOURCES)
def test_a_run_is_that_of_the_plain_copy(kind: str, llama: Path, token_file: Path, tmp_path: Path):
    encoded, plain = folders_of(llama, tmp_path, *SOURCES[kind])
    results = []
    for source in (encoded, plain):
        output = tmp_path / f"from {source.name}"
        run_quantize(source, token_file, output, "--optimize.iterations", 4, "--quant.bits", 3,
                     "--quant.ignore", "v_proj", "--export.formats", "gptq")  # fmt: skip
        verify(parse("verify", [str(output)]), ONE_RANK)
        results.append(result_files(output))
    found, expected = results
    # The records name the sources' bytes, which differ.
    of_source = {name for name in found if name.endswith(("manifest.json", "ledger.jsonl", "README.md", "export.json"))}
    assert found.keys() == expected.keys()
    assert {name for name in found if found[name] != expected[name]} <= of_source
    assert run_evaluate(encoded, token_file)["perplexity"] == run_evaluate(plain, token_file)["perplexity"]
