"""Runs whose training step is compiled: blocks after the first of a kind compile nothing and take no memory."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import Gemma2Config

import tiny
from runs import LAUNCH, last_json, quantize_arguments, run_quantize
from shardq.commands import resume
from shardq.compiling import why_not
from shardq.logs import Display
from shardq.model.block import LoadedBlock
from shardq.training import block as block_pass
from shardq.training import trainer

pytestmark = pytest.mark.skipif(why_not(torch.device("cpu")) is not None, reason="there is no C++ compiler")


def forget_what_was_compiled() -> None:
    torch._dynamo.reset()
    counters.clear()


@pytest.fixture(autouse=True)
def _nothing_compiled_yet() -> None:
    forget_what_was_compiled()


def resident_bytes() -> int:
    """Memory of this process now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


class Notes:
    """What had been compiled, and what was in memory, after each block of a run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.graphs: list[int] = []
        self.resident: list[int] = []
        self.lines: list[str] = []
        monkeypatch.setattr(Display, "advance_block", lambda *_: self.note())
        monkeypatch.setattr(Display, "line", lambda display, text: self.lines.append(text))

    def note(self) -> None:
        self.graphs.append(counters["stats"]["unique_graphs"])
        self.resident.append(resident_bytes())

    def assert_compiled(self) -> None:
        """Everything was compiled, and whole."""
        assert sum(", compiled" in line for line in self.lines) == 1
        assert not any("cannot be compiled" in line for line in self.lines), self.lines
        assert dict(counters["graph_break"]) == {}
        assert self.graphs[0] > 0


def quantize_compiled(folder: Path, tokens: Path, output: Path, *more: object) -> dict:
    """A run whose training step is compiled."""
    return run_quantize(folder, tokens, output, "--optimize.compile", "on", "--optimize.iterations", 8, *more)


GEMMA2 = Gemma2Config(
    vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=128, initializer_range=0.2, sliding_window=9,
    layer_types=["sliding_attention", "full_attention"] * 3,
)  # fmt: skip


def test_blocks_after_the_first_compile_nothing_and_take_no_memory(tmp_path, token_file, monkeypatch):
    notes = Notes(monkeypatch)
    folder = tiny.save_llama(tmp_path / "model", num_blocks=12)
    summary = quantize_compiled(folder, token_file, tmp_path / "out", "--optimize.last_block", "output")
    notes.assert_compiled()
    assert len(notes.graphs) == 12 and len(set(notes.graphs)) == 1, notes.graphs
    assert notes.resident[11] < 1.03 * notes.resident[2], notes.resident
    assert summary["loss_after"] < summary["loss_before"]


def test_each_kind_of_attention_is_compiled_once(tmp_path, token_file, monkeypatch):
    notes = Notes(monkeypatch)
    folder = tiny.save_model(tmp_path / "model", GEMMA2)
    summary = quantize_compiled(folder, token_file, tmp_path / "out")
    notes.assert_compiled()
    assert len(notes.graphs) == 6 and len(set(notes.graphs[1:5])) == 1, notes.graphs
    more = ["the block with its loss at each position", "the divergence of a batch", "and of one sample"]
    assert notes.graphs[5] <= notes.graphs[4] + len(more)
    assert summary["loss_after"] < summary["loss_before"]


def test_compiled_training_ends_where_uncompiled_training_does(llama, token_file, tmp_path, capsys):
    """The last block, which trains to predictions, too."""
    compiled = quantize_compiled(llama, token_file, tmp_path / "on")
    said = capsys.readouterr().out
    assert 0 < said.find("compiling the training step") < said.find("compiled the training step")
    plain = run_quantize(llama, token_file, tmp_path / "off", "--optimize.compile", "off", "--optimize.iterations", 8)
    assert compiled["divergence_after"] < 0.97 * compiled["divergence_before"]
    for key in ("loss_before", "loss_after", "divergence_before", "divergence_after"):
        assert compiled[key] == pytest.approx(plain[key], rel=1e-4), key


def test_served_block_is_computed_by_training_code_and_in_a_replay_to_the_same_bytes(
    llama, token_file, tmp_path, monkeypatch
):
    class Refusing(LoadedBlock):
        def __call__(self, entering):
            raise AssertionError("a served block was computed uncompiled")

    served = trainer.served_forward

    def given(job, loaded):
        return served(job, Refusing(plan=loaded.plan, module=loaded.module, source={}, dtype=loaded.dtype))

    for user in (block_pass, resume):
        monkeypatch.setattr(user, "served_forward", given)
    output, written = tmp_path / "out", []
    for more in ([], ["--redo", 2]):
        quantize_compiled(llama, token_file, output, "--optimize.batch_size", 1, *more)
        written.append({path.name: path.read_bytes() for path in (output / "blocks").iterdir()})
    assert len(written[0]) == 3 and written[0] == written[1]
    assert sum('"redo"' in line for line in (output / "ledger.jsonl").read_text().splitlines()) == 1


def test_served_blocks_compile_nothing_of_their_own(llama, token_file, tmp_path, monkeypatch):
    graphs = []
    for number, bits in enumerate(({}, {"uncompiled": 8})):
        notes = Notes(monkeypatch)
        served = trainer.served_forward

        def given(job, loaded, served=served, bits=bits):
            return served(job, replace(loaded, plan=replace(loaded.plan, activations=bits)))

        monkeypatch.setattr(block_pass, "served_forward", given)
        forget_what_was_compiled()
        quantize_compiled(llama, token_file, tmp_path / str(number), "--optimize.batch_size", 1)
        graphs.append(notes.graphs)
    assert graphs[0] == graphs[1], graphs


@pytest.mark.slow
def test_two_ranks_compile(llama, token_file, tmp_path):
    arguments = quantize_arguments(llama, token_file, tmp_path / "out", "--optimize.compile", "on")
    finished = tiny.torchrun(2, [LAUNCH / "quantize.py", *arguments])
    assert finished.returncode == 0, finished.stderr
    assert ", compiled" in finished.stdout and "cannot be compiled" not in finished.stdout
    summary = last_json(finished.stdout)
    assert summary["blocks"] == 3 and summary["loss_after"] < 0.9 * summary["loss_before"]
