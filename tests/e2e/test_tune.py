"""Tuning a finished run's scales, against a naive loop over the whole model, and whatever comes between."""

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoModelForCausalLM

import forked
import tiny
from runs import LAUNCH, ONE_RANK, last_json, result_files, run_evaluate, run_quantize
from shardq.cli import parse
from shardq.commands import tune as tuning
from shardq.commands.export import export
from shardq.commands.verify import verify
from shardq.errors import CheckpointError, ConfigError, ResumeError, Stopped, StorageError
from shardq.formats.block_file import read_block
from shardq.formats.shards import open_index, read_tensor
from shardq.logs import Display
from shardq.model.skeleton import open_skeleton
from shardq.rundir.folder import RunFolder
from shardq.rundir.ledger import commit

STEPS, BATCH, RATE, LABELS = 6, 4, 0.02, 0.25
RTN = ("--quant.method", "rtn", "--quant.group_size", 16)


@pytest.fixture(scope="module")
def run(llama: Path, token_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run in groups, rounded to nearest. Read only."""
    output = tmp_path_factory.mktemp("rounded") / "out"
    run_quantize(llama, token_file, output, *RTN)
    return output


def tune_arguments(run: Path, model: Path, output: Path, *more: object) -> list[str]:
    fixed = [run, "--model", model, "--output", output, "--tune.steps", STEPS, "--tune.batch_size", BATCH,
             "--tune.learning_rate", RATE, "--tune.label_weight", LABELS, "--tune.precision", "float32"]  # fmt: skip
    return [str(argument) for argument in (*fixed, *more)]


def run_tune(run: Path, model: Path, output: Path, *more: object) -> dict:
    return tuning.tune(parse("tune", tune_arguments(run, model, output, *more)), ONE_RANK)


@pytest.fixture(scope="module")
def tuned(run: Path, llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run's scales tuned on one rank. Read only."""
    output = tmp_path_factory.mktemp("tuned") / "out"
    run_tune(run, llama, output)
    return output


@contextmanager
def stopping_after_a_save(output: Path) -> Iterator[None]:
    """Have the tuning that runs in the body stop once its state is saved."""
    save = tuning.write_checked

    def save_and_stop(path: Path, *state: object) -> None:
        save(path, *state)
        RunFolder(output).stop.touch()

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(tuning, "write_checked", save_and_stop)
        yield


def linears_of(output: Path) -> dict:
    paths = sorted((output / "blocks").iterdir())
    return {name: linear for path in paths for name, linear in read_block(path).items()}


def tuned_naively(
    run: Path, model: Path, tokens_NT: torch.Tensor, steps: int = STEPS, batch: int = BATCH
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Scales by the whole model's own autograd, and each step's loss."""
    teacher, student = (AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval() for _ in range(2))
    linears, losses = linears_of(run), []
    factors = {name: torch.zeros_like(linear.scale_OG, requires_grad=True) for name, linear in linears.items()}
    optimizer = torch.optim.Adagrad(factors.values())
    for step in range(steps):
        batch_NT = tokens_NT[[place % len(tokens_NT) for place in range(step * batch, (step + 1) * batch)]]
        weights = {}
        for name, linear in linears.items():
            scale_OG1 = (linear.scale_OG * factors[name].exp())[..., None]
            codes_OGg = linear.codes_OI.view(*linear.scale_OG.shape, -1).float()
            weights[f"{name}.weight"] = (codes_OGg * scale_OG1).flatten(1)
        logits_NTV = torch.func.functional_call(student, weights, (batch_NT,)).logits
        with torch.no_grad():
            target_NTV = teacher(batch_NT).logits.log_softmax(-1)
        log_q_NTV = logits_NTV.log_softmax(-1)
        kl_NT = functional.kl_div(log_q_NTV, target_NTV, reduction="none", log_target=True).sum(-1)
        nll_NT = -log_q_NTV[:, :-1].gather(-1, batch_NT[:, 1:, None])[..., 0]
        # Behind a sample's last token no label is known.
        total = (LABELS * nll_NT + (1 - LABELS) * kl_NT[:, :-1]).sum() + kl_NT[:, -1].sum()
        losses.append(total.item() / batch_NT.numel())
        optimizer.zero_grad()
        (total / batch).backward()
        cosine = (1 + torch.tensor(torch.pi * step / steps).cos().item()) / 2
        optimizer.param_groups[0]["lr"] = RATE * cosine * (step + 1) ** 0.5
        optimizer.step()
    return {name: linears[name].scale_OG * factor.detach().exp() for name, factor in factors.items()}, losses


def test_scales_are_those_of_a_naive_loop_over_the_whole_model(
    run: Path, tuned: Path, llama: Path, token_file: Path, tmp_path: Path
):
    tokens_NT = load_file(token_file)["tokens"]
    expected, losses = tuned_naively(run, llama, tokens_NT)
    before, after = linears_of(run), linears_of(tuned)
    assert len(expected) == 21
    for name, scale_OG in expected.items():
        # The stored weights that training sees are rounded to float32 here, so only sums in another order differ.
        torch.testing.assert_close(after[name].scale_OG, scale_OG, rtol=1e-3, atol=0)
        assert (after[name].scale_OG - before[name].scale_OG).abs().max() > 0.01 * before[name].scale_OG.abs().max()
        assert torch.equal(after[name].codes_OI, before[name].codes_OI)
    again = run_tune(run, llama, tmp_path / "again")
    assert again["loss_first"] == pytest.approx(losses[0], rel=1e-4)
    assert again["loss_last"] == pytest.approx(losses[-1], rel=1e-3)
    assert result_files(tmp_path / "again") == result_files(tuned)


def test_the_result_is_a_run(run: Path, tuned: Path, token_file: Path, tmp_path: Path):
    assert verify(parse("verify", [str(tuned)]), ONE_RANK)["linears"] == 21
    manifest = json.loads((tuned / "manifest.json").read_text())
    assert manifest["tuned"]["options"]["steps"] == STEPS
    export(parse("export", [str(tuned), "--output", str(tmp_path / "served")]), ONE_RANK)
    card = (tmp_path / "served" / "README.md").read_text()
    assert f"tune:\n  batch_size: {BATCH}\n" in card
    index = open_index(tmp_path / "served")
    for name, linear in linears_of(tuned).items():
        # The checkpoint keeps scales in the model's dtype.
        assert torch.equal(read_tensor(index[f"{name}.weight_scale"]), linear.scale_OG.bfloat16())
    perplexities = [run_evaluate(folder, token_file)["perplexity"] for folder in (run, tuned)]
    assert perplexities[1] < perplexities[0]


def test_two_ranks_give_the_scales_of_one(run: Path, tuned: Path, llama: Path, tmp_path: Path):
    finished = forked.ranks(2, [LAUNCH / "tune.py", *tune_arguments(run, llama, tmp_path / "two")])
    assert finished.returncode == 0, finished.stderr
    assert last_json(finished.stdout)["steps"] == STEPS
    assert f"step {STEPS}/{STEPS}: loss" in finished.stdout
    ours, theirs = linears_of(tmp_path / "two"), linears_of(tuned)
    for name in theirs:
        torch.testing.assert_close(ours[name].scale_OG, theirs[name].scale_OG, rtol=1e-3, atol=0)
        assert torch.equal(ours[name].codes_OI, theirs[name].codes_OI)


def test_a_sample_that_a_batch_holds_twice_counts_twice(
    run: Path, llama: Path, token_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As where batches do not divide among ranks, and one comes round to its samples sooner."""
    monkeypatch.setattr(tuning, "step_samples", lambda *_: ((step, [5, 2, 5]) for step in range(2)))
    run_tune(run, llama, tmp_path / "out", "--tune.steps", 2, "--tune.batch_size", 3)
    tokens_NT = load_file(token_file)["tokens"]
    expected, _ = tuned_naively(run, llama, tokens_NT[[5, 2, 5]], steps=2, batch=3)
    for name, linear in linears_of(tmp_path / "out").items():
        torch.testing.assert_close(linear.scale_OG, expected[name], rtol=1e-3, atol=0)


@pytest.mark.parametrize("placement", ["cpu", "disk"])
def test_a_stopped_tuning_goes_on_from_the_last_saved_step(
    run: Path, tuned: Path, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, placement: str
):
    output, options = tmp_path / "out", ("--cache.placement", placement)
    with (
        stopping_after_a_save(output),
        pytest.raises(Stopped, match="stopped as asked, 4 of 6 steps are done; the same command goes on"),
    ):
        run_tune(run, llama, output, *options)
    steps = []
    step = tuning.tune_step
    monkeypatch.setattr(tuning, "tune_step", lambda *given: steps.append(given[1]) or step(*given))
    run_tune(run, llama, output, *options)
    assert steps == [4, 5]
    assert result_files(output) == result_files(tuned)


def test_a_tuning_that_fails_while_it_writes_goes_on_there(
    run: Path, tuned: Path, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def commit_two(output: Path, block: int | None, *args: object, **facts: object) -> dict:
        if block == 2:
            raise StorageError("the disk is full")
        return commit(output, block, *args, **facts)

    with monkeypatch.context() as patched:
        patched.setattr(tuning.ledger, "commit", commit_two)
        with pytest.raises(StorageError):
            run_tune(run, llama, tmp_path / "out")
    shutil.copytree(tmp_path / "out", tmp_path / "without")
    RunFolder(tmp_path / "without").tuning_state.unlink()
    with pytest.raises(ResumeError, match="tuning.safetensors, from which its blocks were made, is gone"):
        run_tune(run, llama, tmp_path / "without")
    monkeypatch.setattr(tuning, "tune_step", None)  # none is taken again
    run_tune(run, llama, tmp_path / "out")
    assert result_files(tmp_path / "out") == result_files(tuned)


def test_a_finished_tuning_is_left_alone(run: Path, tuned: Path, llama: Path, tmp_path: Path):
    shutil.copytree(tuned, tmp_path / "out")
    assert run_tune(run, llama, tmp_path / "out")["loss_first"] is None
    assert result_files(tmp_path / "out") == result_files(tuned)
    with pytest.raises(ResumeError, match="belongs to another run; different: tuned.options.steps"):
        run_tune(run, llama, tmp_path / "out", "--tune.steps", 7)


def test_a_damaged_state_is_named(run: Path, llama: Path, tmp_path: Path):
    output = tmp_path / "out"
    with stopping_after_a_save(output), pytest.raises(Stopped):
        run_tune(run, llama, output)
    content = bytearray(RunFolder(output).tuning_state.read_bytes())
    content[-1] ^= 1
    RunFolder(output).tuning_state.write_bytes(content)
    with pytest.raises(CheckpointError, match="tuning.safetensors: damaged.*delete it to begin at the first step"):
        run_tune(run, llama, output)


def test_what_cannot_be_tuned_is_refused(run: Path, llama: Path, token_file: Path, tmp_path: Path):
    other = tiny.save_llama(tmp_path / "other", seed=3)
    with pytest.raises(ConfigError, match=r"not the model that .* has quantized; different: model\.weights .*; give"):
        run_tune(run, other, tmp_path / "out")
    with pytest.raises(ConfigError, match="tune.batch_size: 9 is not allowed, it must be at most the run's 8 samples"):
        run_tune(run, llama, tmp_path / "out", "--tune.batch_size", 9)
    nine = replace(ONE_RANK, world_size=9)
    with pytest.raises(ConfigError, match="its 8 samples are fewer than 9 ranks; take fewer"), ExitStack() as held:
        config = parse("tune", tune_arguments(run, llama, tmp_path / "out"))
        tuning._find(config, open_skeleton(llama), nine, Display(0), held)
    with pytest.raises(ConfigError, match="tune.steps: 0 is not allowed, it must be at least 1"):
        run_tune(run, llama, tmp_path / "out", "--tune.steps", 0)
    with pytest.raises(ConfigError, match="output: .* is not allowed, it must be another folder than the run's"):
        run_tune(run, llama, run)
    with pytest.raises(ResumeError, match="holds no run of shardq"):
        run_tune(llama, llama, tmp_path / "out")
    shutil.copytree(run, tmp_path / "unfinished")
    ledger = tmp_path / "unfinished" / "ledger.jsonl"
    ledger.write_bytes(b"".join(ledger.read_bytes().splitlines(keepends=True)[:2]))
    with pytest.raises(ResumeError, match="not finished, 2 block"):
        run_tune(tmp_path / "unfinished", llama, tmp_path / "out")
    tokens = tiny.save_tokens(tmp_path / "tokens.safetensors", seed=0)
    run_quantize(llama, tokens, tmp_path / "moved", *RTN)
    tiny.save_tokens(tokens, seed=1)
    with pytest.raises(ConfigError, match="gives other tokens than those that .* was calibrated on; restore that text"):
        run_tune(tmp_path / "moved", llama, tmp_path / "out")
    assert not (tmp_path / "out").exists()
