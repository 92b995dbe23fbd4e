"""What the model card says of a run, and what it keeps to itself."""

import pytest
import yaml

from shardq.export.base import Format
from shardq.export.gguf import Gguf
from shardq.export.hf import Hf
from shardq.export.model_card import model_card
from shardq.quant.integer_grid import IntegerGrid
from shardq.rundir.account import KINDS, Account, Left

NORMS = Left(kind="norm", reason="vectors", names=("a", "b"), num_parameters=1000, num_bytes=2000)
MTP = Left(kind="further tokens", reason=KINDS["further tokens"], names=("c",), num_parameters=0, num_bytes=0)
ACCOUNT = Account(num_quantized=9000, left=(NORMS, MTP))
HF = Hf("float32")


def card_of(dataset: str, chosen: Format = HF) -> str:
    manifest = {
        "shardq": "0.1.0",
        "options": {"calib": {"dataset": dataset, "samples": 4}, "seed": 0, "cache": None},
        "model": {"config": "c0", "weights": "e1"},
        "calibration_tokens": "70",
    }
    return model_card(
        manifest, {"model.layers.0.mlp": IntegerGrid(bits=4)}, chosen, "AutoModelForCausalLM", 0.0, ACCOUNT
    )


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
