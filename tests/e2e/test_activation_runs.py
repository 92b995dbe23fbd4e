"""Grids of activations of whole runs: against transformers' own forward, with interruptions, on ranks, evaluated."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import forked
from runs import LAUNCH, quantize_arguments, result_files, run_evaluate, run_quantize
from shardq.commands.verify import find_faults
from shardq.errors import ConfigError
from shardq.formats.block_file import read_activations
from shardq.quant.activation import ActivationGrid, rounded

RTN = ("--quant.method", "rtn", "--optimize.start", "minmax")
ALL = ("--activations.bits", 12, "--activations.tensors", "all", "--activations.kv_bits", 6,
       "--activations.symmetric", "false")  # fmt: skip
INPUTS = ("--activations.bits", 8)
BY_TOKEN = (*INPUTS, "--activations.granularity", "token")

TRAINED = (*INPUTS, "--activations.bits", 4, "--activations.in_training", "true")
SHORT = ("--optimize.iterations", 4)


@pytest.fixture(scope="module")
def runs(llama: Path, token_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs rounded to nearest, by how activations get their grids. Read only."""
    folder = tmp_path_factory.mktemp("activations")
    options = {"off": (), "all": ALL, "inputs": INPUTS, "token": BY_TOKEN}
    for name, more in options.items():
        run_quantize(llama, token_file, folder / name, *RTN, *more)
    return {name: folder / name for name in options}


def grids_of(run: Path) -> dict[str, ActivationGrid]:
    return {name: grid for path in sorted((run / "blocks").iterdir()) for name, grid in read_activations(path).items()}


def loaded(run: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(run, dtype=torch.float32).eval()


@torch.inference_mode()
def simulated_logits(run: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Of a run whose linears' inputs have grids, by transformers with hooks of the test's own."""
    model = loaded(run)
    for full, grid in grids_of(run).items():
        linear = model.get_submodule(full.removesuffix(".input"))
        linear.register_forward_pre_hook(lambda module, inputs, grid=grid: rounded(inputs[0], grid))
    return model(tokens).logits


def test_grids_hold_what_the_quantized_model_computes(runs: dict[str, Path], token_file: Path):
    model, extremes = loaded(runs["all"]), {}
    for name, module in model.model.layers.named_modules():
        module.register_forward_hook(
            lambda module, inputs, output, name=f"model.layers.{name}": extremes.update(
                {f"{name}.{side}": (values.min().item(), values.max().item())
                 for side, values in (("input", inputs[0] if inputs else None), ("output", output))
                 if isinstance(values, torch.Tensor)}
            )
        )  # fmt: skip
    with torch.inference_mode():
        model(load_file(token_file)["tokens"])
    grids = grids_of(runs["all"])
    attention = {"query", "key", "value", "scores", "probabilities", "context"}
    assert {name.rpartition(".")[2] for name in grids} == {"input", "output", *attention}
    assert len(grids) == 3 * 28
    for name, grid in grids.items():
        assert grid.bits == (6 if name.endswith((".key", ".value")) else 12) and not grid.symmetric
        place = {"context": "o_proj.input", "value": "v_proj.output"}.get(name.rpartition(".")[2])
        if name.endswith((".query", ".key", ".scores", ".probabilities")):
            assert ".probabilities" not in name or grid.scale == pytest.approx(1 / (2**grid.bits - 1), rel=1e-4)
            continue
        low, high = extremes[f"{name.rpartition('.')[0]}.{place}" if place else name]
        low, high = min(low, 0), max(high, 0)
        assert grid.scale == pytest.approx((high - low) / (2**grid.bits - 1), rel=1e-4), name
        assert abs(grid.zero_point - (-(2 ** (grid.bits - 1)) - low / grid.scale)) < 0.6, name


def test_collecting_changes_nothing_else(runs: dict[str, Path]):
    off = result_files(runs["off"])
    for name in ("all", "inputs", "token"):
        on = result_files(runs[name])
        assert on.keys() == off.keys()
        assert all(on[file] == off[file] for file in off if file.endswith(".safetensors") and "blocks" not in file)
        v1 = [json.loads((runs[run] / "model.encodings").read_text()) for run in ("off", name)]
        assert v1[0]["param_encodings"] == v1[1]["param_encodings"]
    assert json.loads((runs["off"] / "model.encodings").read_text())["activation_encodings"] == []
    assert grids_of(runs["off"]) == {}


def test_encodings_list_static_grids_alone(runs: dict[str, Path]):
    entries = json.loads((runs["inputs"] / "model.encodings").read_text())["activation_encodings"]
    by_module = json.loads((runs["inputs"] / "model_torch.encodings").read_text())["activation_encodings"]
    grids = grids_of(runs["inputs"])
    assert [entry["name"] for entry in entries] == list(grids) and len(grids) == 21
    assert list(by_module) == [name.removesuffix(".input") for name in grids]
    blocks = [json.loads(path.read_text()) for path in sorted((runs["inputs"] / "encodings").glob("*0?.json"))]
    assert [entry for block in blocks for entry in block["activation_encodings"]] == entries
    assert all(not grid.is_static for grid in grids_of(runs["token"]).values())
    assert json.loads((runs["token"] / "model.encodings").read_text())["activation_encodings"] == []


@pytest.mark.parametrize("name", ["inputs", "token"])
def test_evaluation_in_simulation_is_transformers_with_rounded_inputs(
    runs: dict[str, Path], token_file: Path, name: str
):
    tokens = load_file(token_file)["tokens"]
    logits = simulated_logits(runs[name], tokens)[:, :-1]
    expected = math.exp(torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item())
    simulated = run_evaluate(runs[name], token_file, "--activations", "simulated")["perplexity"]
    assert simulated == pytest.approx(expected, rel=1e-4)
    assert simulated != pytest.approx(run_evaluate(runs[name], token_file)["perplexity"], rel=1e-4)


def test_coarser_keys_and_values_are_simulated(runs: dict[str, Path], token_file: Path):
    simulated = run_evaluate(runs["all"], token_file, "--activations", "simulated")["perplexity"]
    assert simulated != pytest.approx(run_evaluate(runs["all"], token_file)["perplexity"], rel=1e-4)


def test_without_grids_there_is_nothing_to_simulate(runs: dict[str, Path], llama: Path, token_file: Path):
    for model in (llama, runs["off"]):
        with pytest.raises(ConfigError, match="holds no grids of activations to simulate"):
            run_evaluate(model, token_file, "--activations", "simulated")


def test_training_with_rounded_inputs_serves_them_better(llama: Path, token_file: Path, tmp_path: Path):
    """The loss that is printed is then that of rounded activations, and the one that training lowers."""
    tokens, found = load_file(token_file)["tokens"], {}
    for name, more in (("left out", ()), ("in training", ("--activations.in_training", "true"))):
        run = tmp_path / name
        summary = run_quantize(llama, token_file, run, "--activations.bits", 4, *more)
        assert summary["loss_after"] < summary["loss_before"]
        found[name] = summary["loss_before"], simulated_logits(run, tokens)
    with torch.inference_mode():
        target = loaded(llama)(tokens).logits
    errors = {name: (logits - target).square().mean().item() for name, (_, logits) in found.items()}
    assert found["in training"][0] > 1.2 * found["left out"][0]
    assert errors["in training"] < 0.98 * errors["left out"], errors


@pytest.mark.slow
def test_compiled_training_rounds_inputs_too(llama: Path, token_file: Path, tmp_path: Path):
    """After a run that does not, in the same process: nothing compiled for that one is used."""
    losses = {}
    for name, more in (("float", INPUTS), ("rounded", TRAINED)):
        for mode in ("on", "off"):
            output = tmp_path / f"{name}-{mode}"
            losses[name, mode] = run_quantize(llama, token_file, output, *more, "--optimize.compile", mode)[
                "loss_after"
            ]
    assert losses["float", "on"] == pytest.approx(losses["float", "off"], rel=0.03)
    assert losses["rounded", "on"] == pytest.approx(losses["rounded", "off"], rel=0.03)
    assert losses["rounded", "on"] > 1.2 * losses["float", "on"]


class Killed(Exception):
    """What a test puts in a kill's place."""


@pytest.mark.parametrize("options", [ALL, TRAINED], ids=["collected", "trained with"])
def test_interrupted_run_ends_with_the_same_bytes(llama: Path, token_file: Path, tmp_path: Path, options: tuple):
    """Its activations are computed again, through the finished blocks."""
    whole = (llama, token_file, tmp_path / "whole", *options, *SHORT, "--cache.placement", "cpu")
    run_quantize(*whole)
    arguments = (*whole[:2], tmp_path / "out", *whole[3:])

    def killed_after_two(block: int | None) -> None:
        if block == 2:
            raise Killed

    with pytest.raises(Killed):
        run_quantize(*arguments, on_commit=killed_after_two)
    run_quantize(*arguments)
    assert result_files(tmp_path / "out") == result_files(tmp_path / "whole")


@pytest.mark.slow
def test_ranks_find_the_grids_of_one_rank(llama: Path, token_file: Path, tmp_path: Path):
    more = (*RTN, *ALL, "--activations.observer", "sqnr")
    run_quantize(llama, token_file, tmp_path / "one", *more)
    arguments = quantize_arguments(llama, token_file, tmp_path / "two", *more)
    finished = forked.ranks(2, [LAUNCH / "quantize.py", *arguments])
    assert finished.returncode == 0, finished.stderr
    assert grids_of(tmp_path / "two") == grids_of(tmp_path / "one")


def test_verify_names_encodings_that_are_not_the_grids(
    llama: Path, token_file: Path, tmp_path: Path, runs: dict[str, Path]
):
    run = tmp_path / "run"
    run_quantize(llama, token_file, run, *RTN, *INPUTS)
    assert find_faults(run)[0]["encodings"] == find_faults(runs["all"])[0]["encodings"] == []
    for name in ("encodings/block-00001.json", "encodings/block-00001_torch.json", "model.encodings",
                 "model_torch.encodings"):  # fmt: skip
        text = (run / name).read_text()
        old, new = ('"offset": -128', '"offset": -127') if "torch" in name else ("[-128]", "[-127]")
        (run / name).write_text(text.replace(old, new, 1))  # the activations come first
        assert (run / name).read_text() != text
        (fault,) = find_faults(run)[0]["encodings"]
        assert name in fault and "activations" in fault
        (run / name).write_text(text)


def test_another_observer_is_another_run(runs: dict[str, Path], llama: Path, token_file: Path):
    with pytest.raises(Exception, match=r"activations\.observer \(was minmax, is sqnr\)"):
        run_quantize(llama, token_file, runs["inputs"], *RTN, *INPUTS, "--activations.observer", "sqnr")


@pytest.mark.parametrize(
    "options, reason",
    [
        (("--activations.bits", 3), "activations.bits: 3"),
        (("--activations.kv_bits", 17), "activations.kv_bits: 17"),
        (("--activations.kv_bits", 8, "--activations.tensors", "all"), "activations.tensors: all"),
        (("--activations.bits", 8, "--activations.percentile", 40), "activations.percentile: 40"),
        (("--activations.in_training", "true"), "activations.in_training: True"),
        (("--activations.bits", 16, "--export.activation_bits", 8), "export.activation_bits: 8"),
        ((*TRAINED, "--activations.kv_bits", 8), "activations.in_training: True"),
        ((*TRAINED, "--activations.tensors", "all"), "activations.in_training: True"),
    ],
)
def test_what_makes_no_sense_is_refused(llama: Path, token_file: Path, tmp_path: Path, options: tuple, reason: str):
    with pytest.raises(ConfigError, match=reason):
        run_quantize(llama, token_file, tmp_path / "out", *RTN, *options)
