"""What the model card says of a run, and what it keeps to itself."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from shardq.export.base import Format
from shardq.export.gguf import Gguf
from shardq.export.hf import Hf
from shardq.export.model_card import model_card
from shardq.quant.integer_grid import IntegerGrid
from shardq.rundir.account import KINDS, Account, Left
from shardq.rundir.record import RunRecord

NORMS = Left(kind="norm", reason="vectors", names=("a", "b"), num_parameters=1000, num_bytes=2000)
MTP = Left(kind="further tokens", reason=KINDS["further tokens"], names=("c",), num_parameters=0, num_bytes=0)
ACCOUNT = Account(num_quantized=9000, left=(NORMS, MTP))
HF = Hf("float32")


def card_of(
    dataset: str, chosen: Format = HF, source: Path = Path("nowhere"), blocks: Sequence[dict] = (), **of_model: str
) -> str:
    manifest = {
        "shardq": "0.1.0",
        "options": {"calib": {"dataset": dataset, "samples": 4}, "seed": 0, "cache": None},
        "model": {"config": "c0", "weights": "e1"},
        "calibration_tokens": "70",
    }
    grids = {"model.layers.0.mlp": IntegerGrid(bits=4)}
    record = RunRecord(source, [{"redo": [], "manifest": manifest | {"model": manifest["model"] | of_model}}, *blocks])
    return model_card(record, source, grids, chosen, "AutoModelForCausalLM", 0.0, ACCOUNT)


@pytest.mark.parametrize(
    ("dataset", "named"),
    [
        ("c4", "c4"),
        ("allenai/c4", "allenai/c4"),
        ("ultrachat:0.75,code:0.25", "ultrachat:0.75,code:0.25"),
        ("/home/me/texts/a.jsonl", "a.jsonl"),
        ("../texts/a.parquet", "a.parquet"),
        ("texts/a.txt", "a.txt"),
        ("/data/sets/mine", "mine"),
        ("/home/me/a.jsonl:0.5,allenai/c4:0.25,texts/b.txt:0.25", "a.jsonl:0.5,allenai/c4:0.25,b.txt:0.25"),
    ],
)
def test_datasets_are_named_without_the_folders_of_the_machine(dataset: str, named: str):
    recipe = yaml.safe_load(card_of(dataset).split("```yaml\n")[1].split("```")[0])
    assert recipe == {"calib": {"dataset": named, "samples": 4}, "seed": 0}


def test_the_share_that_is_quantized_and_the_rest_are_listed():
    section = card_of("c4").split("## What is quantized\n\n")[1].split("\n\n## ")[0]
    assert section == (
        "Quantized: 90.0% of 10.0 k parameters; left as they are:\n\n"
        "- norm: 1.0 k parameters in 2 tensor(s), 2.0 kB (vectors)\n"
        f"- further tokens: 0 parameters in 1 tensor(s), 0.0 kB ({MTP.reason})"
    )
    assert "of the text decoder alone, without further tokens (1 tensor(s))." in card_of("c4", Gguf())


def test_the_base_model_its_licence_and_the_losses_are_named(tmp_path: Path):
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\nlanguage:\n- en\ntags: [chat]\n---\n\n# Text\n")
    blocks = [
        {"block": 0, "files": {}, "loss_before": 0.02, "loss_after": 0.01},
        {"block": 1, "files": {}, "loss_before": 0.04, "loss_after": 0.02},
        {"block": 2, "files": {}, "divergence_before": 0.5, "divergence_after": 0.25},
    ]
    card = card_of("c4", source=tmp_path, blocks=blocks, name="owner/model")
    assert yaml.safe_load(card.split("---\n")[1]) == {
        "license": "apache-2.0", "language": ["en"], "base_model": "owner/model", "base_model_relation": "quantized",
        "library_name": "transformers", "tags": ["shardq", "hf"],
    }  # fmt: skip
    assert "mean of 2 block(s): 3.000e-02 rounded to nearest, 1.500e-02 trained" in card
    assert "mean of 1 block(s): 5.000e-01 rounded to nearest, 2.500e-01 trained" in card


@pytest.mark.parametrize("content", [None, b"no front matter", b"---\n{\n---\n", b"---\n- a\n---\n", b"\xff\xfe---\n"])
def test_a_source_without_a_card_that_can_be_read_gives_no_licence(tmp_path: Path, content: bytes | None):
    if content is not None:
        (tmp_path / "README.md").write_bytes(content)
    assert yaml.safe_load(card_of("c4", source=tmp_path).split("---\n")[1]).keys() == {"library_name", "tags"}
