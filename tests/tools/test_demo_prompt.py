"""The demo's last lines, on a tiny model."""

import importlib.util
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

import tiny

SCRIPT = Path(__file__).parents[2] / "tools" / "demo_prompt.py"


def test_demo_ends_with_both_models_words_and_the_line_that_serves(tmp_path: Path, capsys: pytest.CaptureFixture):
    spec = importlib.util.spec_from_file_location("demo_prompt", SCRIPT)
    demo_prompt = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo_prompt)
    folders = [str(tiny.save_llama(tmp_path / name, num_blocks=1, seed=seed)) for seed, name in enumerate("ab")]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(f"{folders[0]}/tokenizer.json")
    demo_prompt.main(["--model", folders[0], "--output", folders[1]])
    *_, prompt, first, second, last, _ = capsys.readouterr().out.split("\n")
    assert prompt.startswith("prompt: ") and last == f"serve it: vllm serve {folders[1]}"
    assert first.startswith("float: ... ") and second.startswith("quantized: ... ")
    assert first.partition("...")[2] != second.partition("...")[2]
