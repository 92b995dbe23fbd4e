"""Nothing of a source is lost: a run of a checkpoint that has every file and tensor of published ones."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import tiny
from runs import ONE_RANK, run_quantize
from shardq.cli import parse
from shardq.commands.verify import verify

FORMATS = ("compressed-tensors", "hf")
FURTHER = {
    "mtp.layers.0.eh_proj.weight": torch.randn(64, 128).bfloat16(),
    "model.layers.3.mlp.up_proj.weight": torch.randn(64, 64).half(),
    "rotary.inv_freq": torch.randn(8),
}


@pytest.fixture(name="published", scope="module")
def _published(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with further tensors, all companions, and weights that are not its own. Read only."""
    folder = shutil.copytree(llama, tmp_path_factory.mktemp("published") / "model")
    for name in tiny.COMPANIONS:
        if not (folder / name).exists():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(f"\xff {name}".encode("latin-1"))
    save_file(FURTHER, folder / "further.safetensors")
    save_file({"layers.0.wq": torch.ones(4)}, folder / "consolidated.safetensors")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] |= dict.fromkeys(FURTHER, "further.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors that a folder's index names, as the safetensors library reads them."""
    tensors = {}
    for name, shard in json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"].items():
        with safe_open(folder / shard, framework="pt") as file:
            tensors[name] = file.get_tensor(name)
    return tensors


def test_every_tensor_and_file_is_in_the_outputs_and_told(published, token_file, tmp_path, capsys):
    run = tmp_path / "run"
    summary = run_quantize(published, token_file, run, "--quant.method", "rtn", "--quant.ignore", "*.k_proj",
                           "--export.formats", f"[{','.join(FORMATS)}]")  # fmt: skip
    said = capsys.readouterr().out
    assert "not read: consolidated.safetensors (model.safetensors.index.json does not name it)" in said
    source = stored(published)
    for folder in (run, *(run / chosen for chosen in FORMATS)):
        differing = [
            name for name in tiny.COMPANIONS if (folder / name).read_bytes() != (published / name).read_bytes()
        ]
        assert differing == []
        assert not (folder / "consolidated.safetensors").exists()
    for folder in (run, run / "hf"):
        written = stored(folder)
        assert written.keys() == source.keys()
        as_it_was = {name for name in source if written[name].dtype == source[name].dtype}
        assert all(torch.equal(written[name], source[name]) for name in as_it_was)
        assert as_it_was >= FURTHER.keys() and len(source) - len(as_it_was) == 18  # 6 linears of 3 blocks, in float32
    left = {part["kind"]: part for part in summary["left"]}
    assert summary["parameters"] == sum(tensor.numel() for tensor in source.values())
    assert summary["quantized_parameters"] == sum(source[name].numel() for name in source.keys() - as_it_was)
    assert left["further tokens"]["tensors"] == 2 and left["unused"]["parameters"] == 8
    assert left["linear"]["tensors"] == 3 and "*.k_proj" in left["linear"]["reason"]
    assert all(f"  {kind}: " in said for kind in left)


def test_verify_and_the_model_card_say_what_the_run_said(published, token_file, tmp_path, capsys):
    run = tmp_path / "run"
    summary = run_quantize(published, token_file, run, "--quant.method", "rtn", "--export.formats", "[hf]")
    kinds = {part["kind"] for part in summary["left"]}
    said = capsys.readouterr().out
    share = next(line for line in said.splitlines() if line.startswith("quantized: "))
    checked = verify(parse("verify", [str(run)]), ONE_RANK)
    assert {name: checked[name] for name in ("parameters", "quantized_parameters", "left")} == {
        name: summary[name] for name in ("parameters", "quantized_parameters", "left")
    }
    assert share in capsys.readouterr().out
    card = (run / "hf" / "README.md").read_text()
    assert share[1:] in card and all(f"- {kind}: " in card for kind in kinds)
