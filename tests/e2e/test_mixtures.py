"""Mixtures of experts, quantized jointly and by parts: tokens of experts, equal bytes, resume, ranks, the choice."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig

import forked
import runs
import tiny
from shardq.errors import Stopped
from shardq.formats.block_file import read_block
from shardq.formats.tensor_file import read_tensors
from shardq.quant.quantized import QuantizedLinear

CONFIG = MixtralConfig(
    vocab_size=211, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, initializer_range=0.3, tie_word_embeddings=False,
)  # fmt: skip
SHORT = ("--optimize.iterations", 4, "--optimize.start", "search", "--optimize.last_block", "output")
LEAST = ("--optimize.min_expert_tokens", 245)  # of the 512 tokens, each of which chooses two of four experts


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("mixture") / "model", CONFIG, dtype=torch.float32)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_tokens(tmp_path_factory.mktemp("tokens") / "tokens.safetensors", vocab=211)


def ledger(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "ledger.jsonl").read_text().splitlines()]


def linears(output: Path, number: int) -> dict[str, QuantizedLinear]:
    return read_block(output / "blocks" / f"block-{number:05d}.safetensors")


def equal(one: QuantizedLinear, other: QuantizedLinear) -> bool:
    return torch.equal(one.codes_OI, other.codes_OI) and torch.equal(one.scale_OG, other.scale_OG)


def test_starved_experts_keep_the_start_and_are_named(
    model: Path, tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    runs.run_quantize(model, tokens, tmp_path / "joint", *SHORT, *LEAST)
    shown = capsys.readouterr().out
    runs.run_quantize(model, tokens, tmp_path / "rtn", *SHORT, *LEAST, "--quant.method", "rtn")
    with torch.no_grad():
        whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        routed = whole(read_tensors(tokens)["tokens"], output_router_logits=True).router_logits[0].view(-1, 4)
    counts = routed.topk(2).indices.flatten().bincount(minlength=4).tolist()
    events = [json.loads(line) for line in (tmp_path / "joint" / "events.jsonl").read_text().splitlines()]
    assert next(event for event in events if event["span"] == "fp pass")["expert_tokens"] == {"mlp.experts": counts}
    starved = {f"mlp.experts.{number}": count for number, count in enumerate(counts) if count < 245}
    assert 0 < len(starved) < 4 and ledger(tmp_path / "joint")[0]["starved_experts"] == starved
    said = f"{len(starved)} expert(s) got fewer than 245 tokens and stay at the start: {next(iter(starved))}"
    assert shown.count(said) == 2
    trained, nearest = linears(tmp_path / "joint", 0), linears(tmp_path / "rtn", 0)
    for name, linear in trained.items():
        expert = name.removeprefix("model.layers.0.").rpartition(".")[0]
        assert equal(linear, nearest[name]) == (expert in starved), name


def test_parts_give_what_joint_passes_give(model: Path, tokens: Path, tmp_path: Path):
    nearest = ("--quant.method", "rtn", *SHORT, *LEAST, "--optimize.experts")
    joint = runs.run_quantize(model, tokens, tmp_path / "joint", *nearest, "joint")
    parts = runs.run_quantize(model, tokens, tmp_path / "parts", *nearest, "parts")
    assert parts["loss_after"] == pytest.approx(joint["loss_after"], rel=1e-6)
    for number in (0, 1):
        ours, theirs = linears(tmp_path / "parts", number), linears(tmp_path / "joint", number)
        assert ours.keys() == theirs.keys() and all(equal(linear, theirs[name]) for name, linear in ours.items())
    weights = [path.relative_to(tmp_path / "joint") for path in (tmp_path / "joint").rglob("*.safetensors")]
    assert len(weights) > 3
    for path in weights:
        assert (tmp_path / "parts" / path).read_bytes() == (tmp_path / "joint" / path).read_bytes(), path


def test_parts_train_resume_and_do_not_depend_on_how_many_experts_fit(
    model: Path, tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    summary = runs.run_quantize(model, tokens, tmp_path / "all", *SHORT, "--optimize.experts", "parts")
    assert summary["loss_after"] < summary["loss_before"]
    with pytest.raises(Stopped):
        runs.run_quantize(model, tokens, tmp_path / "few", *SHORT, "--optimize.memory_gib", 0.0004, stop_after=0)
    assert "optimize.experts: parts (model.layers.0 takes 0.00 GiB a rank with all" in capsys.readouterr().out
    runs.run_quantize(model, tokens, tmp_path / "few", *SHORT, "--cache.placement", "cpu", "--optimize.experts", "auto")
    for number in (0, 1):
        ours, theirs = linears(tmp_path / "few", number), linears(tmp_path / "all", number)
        assert all(equal(linear, theirs[name]) for name, linear in ours.items())


@pytest.mark.slow
@pytest.mark.parametrize("way", ["joint", "parts"])
def test_two_ranks_train_experts_as_one_does(model: Path, tokens: Path, tmp_path: Path, way: str):
    arguments = [*SHORT, "--optimize.experts", way]
    runs.run_quantize(model, tokens, tmp_path / "one", *arguments)
    finished = forked.ranks(2, [runs.LAUNCH / "quantize.py",
                                *runs.quantize_arguments(model, tokens, tmp_path / "two", *arguments)])  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    for number in (0, 1):
        ours, theirs = linears(tmp_path / "two", number), linears(tmp_path / "one", number)
        for name, linear in ours.items():
            assert (linear.codes_OI == theirs[name].codes_OI).float().mean() > 0.98, name
