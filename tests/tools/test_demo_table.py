"""The demo's closing table: bytes before and after, and the lines it prints."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import demo_table  # noqa: E402


@pytest.fixture
def folders(tmp_path):
    """A source model in two shards and a quantized folder whose one block holds two linears."""
    model, blocks = tmp_path / "model", tmp_path / "out" / "blocks"
    model.mkdir()
    blocks.mkdir(parents=True)
    half = {"dtype": torch.bfloat16}
    save_file({"embed.weight": torch.zeros(10, 8, **half)}, model / "model-1.safetensors")
    linears = {"l.0.q.weight": torch.zeros(8, 8, **half), "l.0.k.weight": torch.zeros(4, 8, **half)}
    save_file(linears | {"l.0.norm.weight": torch.zeros(8, **half)}, model / "model-2.safetensors")
    packed = {
        "l.0.q.codes": torch.zeros(32, dtype=torch.uint8),
        "l.0.q.scale": torch.zeros(8, **half),
        "l.0.q.zero_point": torch.zeros(8, dtype=torch.uint8),
        "l.0.k.codes": torch.zeros(16, dtype=torch.uint8),
        "l.0.k.scale": torch.zeros(4, **half),
        "l.0.norm.weight": torch.zeros(8, **half),
    }
    save_file(packed, blocks / "block-00000.safetensors", metadata={"format": "pt"})
    return model, tmp_path / "out"


def test_model_bytes_count_codes_for_linears_and_the_source_for_the_rest(folders):
    embedding, norm, linears = 160, 16, 128 + 64
    packed = (32 + 16 + 8) + (16 + 8)
    assert demo_table.model_bytes(*folders) == (embedding + norm + linears, embedding + norm + packed)


def test_a_linear_that_the_source_lacks_is_one_line(folders):
    model, out = folders
    (model / "model-2.safetensors").unlink()
    with pytest.raises(SystemExit, match=r"l\.0\.[qk] is not a linear of .*; give the model"):
        demo_table.model_bytes(model, out)


def test_an_empty_folder_is_one_line(tmp_path):
    with pytest.raises(SystemExit, match="holds no safetensors tensors"):
        demo_table.tensor_bytes(tmp_path)


def test_a_missing_or_broken_measurement_is_one_line(tmp_path):
    with pytest.raises(SystemExit, match=r"out\.run\.json: missing; run tools/demo\.sh first"):
        demo_table.read_measurement(tmp_path / "out", "run")
    (tmp_path / "out.run.json").write_text("Traceback")
    with pytest.raises(SystemExit, match=r"out\.run\.json: not JSON; delete it"):
        demo_table.read_measurement(tmp_path / "out", "run")


def test_main_prints_every_figure(folders, capsys):
    model, out = folders
    measured = {"tokens": 20, "seconds": 12.34, "peak_rss_bytes": 512 * 2**20}
    for name, perplexity in (("float", 20.5), ("rtn", 30.25), ("quantized", 22.125)):
        Path(f"{out}.{name}.json").write_text(json.dumps(measured | {"perplexity": perplexity}))
    run = {"output": str(out), "blocks": 1, "seconds": 99.9, "peak_rss_bytes": 2**30}
    Path(f"{out}.run.json").write_text(json.dumps(run | {"loss_before": 0.5, "loss_after": 0.125}))
    demo_table.main(["--model", str(model), "--output", str(out)])
    printed = capsys.readouterr().out
    for label, perplexity in (("float", "20.500"), ("round-to-nearest", "30.250"), ("AdaScale", "22.125")):
        row = next(line for line in printed.splitlines() if label in line)
        assert [cell.strip() for cell in row.split("│")[1:-1]] == [label, perplexity, "12.3", "512"]
    assert "quantization: 99.9 s, peak 1024 MiB per rank, 1 blocks, loss 0.5 -> 0.125" in printed
    assert "model: 368 -> 256 bytes (1.44 times smaller)" in printed
