"""The tool that trains a tiny mixture leaves a folder that transformers loads and a tokenizer of its text."""

import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

TOOL = Path(__file__).parents[2] / "tools" / "tiny_mixture.py"


@pytest.mark.slow
def test_mixture_is_trained_and_loads(tmp_path: Path):
    text = " ".join(f"the {number} experts of a block and their {number * number} tokens." for number in range(2000))
    (tmp_path / "text.txt").write_text(text)
    arguments = ["--text", tmp_path / "text.txt", "--steps", 2, "--batch", 2, "--length", 32]
    subprocess.run([sys.executable, TOOL, tmp_path / "model", *map(str, arguments)], check=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.config.num_experts == 8
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.decode(tokenizer(text[:99])["input_ids"]) == text[:99]
