"""README's commands of shardq, in their order, on a tiny model and in a folder that is not the checkout."""

from pathlib import Path

import pytest
from safetensors import safe_open

import tiny
from runs import ONE_RANK
from shardq.cli import parse
from shardq.verbs import COMMANDS
from shown import PAGES, ours, shown_lines

SHORT = {
    "quantize": ["--calib.dataset", "ids.safetensors", "--calib.samples", "4", "--calib.sequence_length", "32",
                 "--optimize.iterations", "2", "--optimize.compile", "off"],
    "evaluate": ["--eval.dataset", "ids.safetensors", "--eval.sequence_length", "32"],
}  # fmt: skip


def test_readme_s_commands_do_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("meta-llama/Llama-3.1-8B", "path/to/model"):
        tiny.save_llama(tmp_path / folder, num_blocks=2, hidden=128, max_shard_size="1GB")
    tiny.save_tokens(tmp_path / "ids.safetensors", length=32)
    given = [ours(line) for line in shown_lines(PAGES["README.md"])]
    done = {}
    for verb, _, arguments in filter(None, given):
        if "--help" not in arguments:
            summary = COMMANDS[verb].run(parse(verb, [*arguments, *SHORT.get(verb, [])]), ONE_RANK)
            done.setdefault(verb, []).append(summary)
    assert done.keys() == COMMANDS.keys()
    assert all(Path(run["output"], "model.safetensors.index.json").exists() for run in done["quantize"] + done["tune"])
    for folder, kind in {"runs/w4": "weight_packed", "runs/w8a8": "weight", "runs/aimet": "weight",
                         "served": "qweight"}.items():  # fmt: skip
        with safe_open(Path(folder, "model-00001-of-00003.safetensors"), "pt") as shard:
            assert any(name.endswith(f"q_proj.{kind}") for name in shard.keys())
