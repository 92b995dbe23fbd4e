"""Bad input: one line that names what, where and what to do; a non-zero exit on every rank; nothing written."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from runs import LAUNCH, committed, failing_launch, quantize_arguments, run_evaluate, run_quantize
from shardq import errors


def edit_tensor(folder, name, change):
    """Rewrite the shard that holds a tensor, with `change` applied to it."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    file = folder / index["weight_map"][name]
    tensors = load_file(file)
    tensors[name] = change(tensors[name])
    save_file(tensors, file, {"format": "pt"})


def edit_json(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def with_value(tensor, value):
    tensor = tensor.clone()
    tensor[1, 2] = value
    return tensor


def truncate(file):
    os.truncate(file, file.stat().st_size - 8)


INDEX, CONFIG = "model.safetensors.index.json", "config.json"
SHARD = "model-00002-of-00005.safetensors"
UP_PROJ = "model.layers.2.mlp.up_proj.weight"
CHECKPOINT, UNSUPPORTED = errors.CheckpointError, errors.UnsupportedModelError

DAMAGED_MODELS = {
    "missing folder": (shutil.rmtree, CHECKPOINT, "no such folder"),
    "missing config": (lambda m: (m / CONFIG).unlink(), CHECKPOINT, "config.json: missing"),
    "missing shard": (lambda m: (m / SHARD).unlink(), CHECKPOINT, f"{SHARD}: missing"),
    "truncated shard": (lambda m: truncate(m / SHARD), CHECKPOINT, f"{SHARD}: truncated"),
    "no weights": (lambda m: [f.unlink() for f in m.glob("*.safetensors*")], CHECKPOINT, "holds neither"),
    "tensor not in index": (
        lambda m: edit_json(m / INDEX, lambda index: index["weight_map"].pop(UP_PROJ)),
        CHECKPOINT, f"{UP_PROJ} is missing",
    ),
    "wrong shape": (
        lambda m: edit_tensor(m, UP_PROJ, lambda t: t[:-1].contiguous()), CHECKPOINT, f"{UP_PROJ} has shape [127, 64]"
    ),
    "NaN": (lambda m: edit_tensor(m, UP_PROJ, lambda t: with_value(t, torch.nan)), CHECKPOINT, "holds nan at [1, 2]"),
    "infinity": (
        lambda m: edit_tensor(m, UP_PROJ, lambda t: with_value(t, torch.inf)), CHECKPOINT, "holds inf at [1, 2]"
    ),
    "integer dtype": (
        lambda m: edit_tensor(m, UP_PROJ, lambda t: t.to(torch.int8)), UNSUPPORTED, f"{UP_PROJ} has dtype I8"
    ),
    "quantized": (
        lambda m: edit_json(m / CONFIG, lambda c: c.update(quantization_config={"quant_method": "aqlm"})),
        UNSUPPORTED, "already quantized (aqlm)",
    ),
    "unknown architecture": (
        lambda m: edit_json(m / CONFIG, lambda c: c.update(model_type="nobody_knows")), UNSUPPORTED, "nobody_knows"
    ),
}  # fmt: skip


@pytest.fixture
def model(llama, tmp_path):
    """A copy of the tiny Llama to damage."""
    return shutil.copytree(llama, tmp_path / "model")


def check_one_line(error, named):
    message = str(error.value)
    assert named in message
    assert "\n" not in message.strip() and len(message) < 500


@pytest.mark.parametrize("damage, kind, named", DAMAGED_MODELS.values(), ids=DAMAGED_MODELS)
def test_damaged_models_are_refused(model, token_file, tmp_path, damage, kind, named):
    damage(model)
    with pytest.raises(kind) as error:
        run_quantize(model, token_file, tmp_path / "out")
    check_one_line(error, named)
    # A damaged value is found when its block is read; blocks before it stay finished and whole.
    assert committed(tmp_path / "out") == (2 if "holds" in named and "neither" not in named else 0)


@pytest.mark.parametrize(
    "more, kind, named",
    [
        (["--quant.bits", 1], errors.ConfigError, "quant.bits: 1"),
        (["--quant.bits", 9], errors.ConfigError, "quant.bits: 9"),
        (["--quant.bits", -9], errors.ConfigError, "quant.bits: -9"),
        (["--quant.full_range", "true", "--quant.symmetric", "false"], errors.ConfigError, "quant.full_range: True"),
        (
            ["--quant.decompressed_bits", 8],
            errors.ConfigError,
            "quant.decompressed_bits: 8 is not allowed, it must be left",
        ),
        (
            ["--quant.group_size", 32, "--quant.decompressed_bits", 4],
            errors.ConfigError,
            "above bits (4), at most",
        ),
        (["--quant.group_size", 32, "--quant.decompressed_bits", 17], errors.ConfigError, "decompressed_bits: 17"),
        (
            ["--quant.group_size", 32, "--quant.decompressed_bits", 8, "--quant.symmetric", "false"],
            errors.ConfigError,
            "symmetric grids in groups",
        ),
        (
            ["--quant.group_size", 32, "--quant.decompressed_bits", 8, "--quant.full_range", "true"],
            errors.ConfigError,
            "not full-range",
        ),
        (["--quant.group_size", 48], errors.ConfigError, "48 does not divide the 64 input channels"),
        (["--quant.group_size", 0], errors.ConfigError, "quant.group_size: 0"),
        (["--quant.ignore", "nothing_like_it"], errors.ConfigError, "'nothing_like_it' matches no linear"),
        (["--quant.ignore", "*_proj"], UNSUPPORTED, "no linear would be quantized"),
        (["--quant.method", "none"], errors.ConfigError, "quant.method: none"),
        (["--optimize.iterations", 0], errors.ConfigError, "optimize.iterations: 0"),
        (["--optimize.batch_size", 9], errors.ConfigError, "optimize.batch_size: 9"),
        (["--optimize.grid_lr", 0], errors.ConfigError, "optimize.grid_lr: 0"),
        (["--optimize.micro_batch", 0], errors.ConfigError, "optimize.micro_batch: 0"),
        (["--optimize.micro_batch", 3], errors.ConfigError, "optimize.micro_batch: 3"),
        (["--optimize.memory_gib", 0], errors.ConfigError, "optimize.memory_gib: 0"),
        (["--optimize.memory_gib", 1e-4], errors.ConfigError, "optimize.memory_gib: 0.0001 is too little"),
        (["--optimize.held_out", 8], errors.ConfigError, "optimize.held_out: 8"),
        (["--optimize.held_out", 7], errors.ConfigError, "optimize.batch_size: 2 is not allowed, it must be at most"),
        (["--optimize.fp_mix", 1.5], errors.ConfigError, "optimize.fp_mix: 1.5"),
        (["--optimize.label_weight", -0.1], errors.ConfigError, "optimize.label_weight: -0.1"),
        (["--parallel.engine", "allreduce"], errors.ConfigError, "parallel.engine: allreduce"),
        (["--parallel.offload", "true"], errors.ConfigError, "parallel.offload: True"),
        (["--parallel.deepspeed", "ds.json"], errors.ConfigError, "parallel.deepspeed: ds.json"),
        (
            ["--parallel.engine", "zero2", "--parallel.deepspeed", "absent.json"],
            errors.ConfigError,
            "absent.json: cannot be read",
        ),
        (["--calib.samples", 9], errors.CalibrationError, "gives 8 sequences"),
        (["--calib.sequence_length", 65], errors.CalibrationError, "sequences of 64 tokens are shorter"),
        (["--calib.sequence_length", 1000], errors.ConfigError, "beyond the model's 128 positions"),
        (["--calib.dataset", "absent.jsonl"], errors.CalibrationError, "no tokenizer"),
        (["--calib.dataset", "absent.safetensors"], errors.CalibrationError, "absent.safetensors"),
        (["--resume", "require"], errors.ResumeError, "no run to resume"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_options_that_cannot_work_are_refused(llama, token_file, tmp_path, more, kind, named):
    with pytest.raises(kind) as error:
        run_quantize(llama, token_file, tmp_path / "out", *more)
    check_one_line(error, named)
    assert not (tmp_path / "out").exists()


def test_compiling_that_is_asked_for_needs_a_compiler(llama, token_file, tmp_path, monkeypatch):
    monkeypatch.setattr("shardq.commands.prepare.why_not", lambda device: "no C++ compiler")
    with pytest.raises(errors.ConfigError) as error:
        run_quantize(llama, token_file, tmp_path / "out", "--optimize.compile", "on")
    check_one_line(error, "optimize.compile: on is asked for, but there is no C++ compiler")
    assert not (tmp_path / "out").exists()


def test_run_goes_on_uncompiled_where_compiling_is_optional(llama, token_file, tmp_path, monkeypatch, capsys):
    for module in ("prepare", "summary"):  # what chooses, and what says so
        monkeypatch.setattr(f"shardq.commands.{module}.why_not", lambda device: "no C++ compiler")
    run_quantize(llama, token_file, tmp_path / "out", "--optimize.compile", "auto", "--optimize.iterations", 1)
    assert "not compiled: no C++ compiler" in capsys.readouterr().out


def test_token_ids_beyond_the_vocabulary_are_refused(llama, tmp_path):
    tokens = tiny.save_tokens(tmp_path / "tokens.safetensors", vocab=400)
    with pytest.raises(errors.CalibrationError, match="outside the model's vocabulary of 300"):
        run_quantize(llama, tokens, tmp_path / "out")


def test_foreign_output_folder_is_left_alone(llama, token_file, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("two years of work")
    with pytest.raises(errors.ResumeError, match="not empty and not a run"):
        run_quantize(llama, token_file, tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_finished_run_is_not_overwritten_with_resume_never(llama, token_file, tmp_path):
    run_quantize(llama, token_file, tmp_path / "out")
    with pytest.raises(errors.ResumeError, match="already holds a run"):
        run_quantize(llama, token_file, tmp_path / "out", "--resume", "never")


def test_output_that_cannot_be_made_is_refused(llama, token_file):
    with pytest.raises(errors.StorageError, match="/proc/nowhere"):
        run_quantize(llama, token_file, "/proc/nowhere/out")


def test_evaluation_trains_nothing(llama, token_file):
    with pytest.raises(errors.ConfigError, match="quant.method: adascale"):
        run_evaluate(llama, token_file, "--quant.method", "adascale")


def test_evaluation_on_disk_needs_a_folder(llama, token_file):
    with pytest.raises(errors.ConfigError, match="--cache.folder"):
        run_evaluate(llama, token_file, "--cache.placement", "disk")


def test_bad_option_ends_the_command_with_code_2_and_one_line(llama, token_file, tmp_path):
    arguments = quantize_arguments(llama, token_file, tmp_path / "out", "--optimize.micro_batch", 3)
    finished = subprocess.run([sys.executable, LAUNCH / "quantize.py", *arguments], capture_output=True, text=True)
    assert finished.returncode == 2
    assert finished.stderr == (
        "shardq: optimize.micro_batch: 3 is not allowed, it must be between 1 and optimize.batch_size (2)\n"
    )


def test_an_error_that_all_ranks_see_is_printed_once(llama, token_file, tmp_path):
    lines = failing_launch(
        quantize_arguments(llama, token_file, tmp_path / "out", "--quant.group_size", 48), tiny.torchrun
    )
    assert len(lines) == 1 and "48 does not divide" in lines[0]


@pytest.mark.parametrize("samples, held_out, needed", [(1, 0, 2), (8, 7, 9)])
def test_a_rank_without_samples_is_refused(llama, token_file, tmp_path, samples, held_out, needed):
    more = ["--calib.samples", samples, "--optimize.held_out", held_out, "--optimize.batch_size", 1]
    lines = failing_launch(quantize_arguments(llama, token_file, tmp_path / "out", *more))
    assert len(lines) == 1
    assert f"calib.samples: {samples} is not allowed, it must be at least {needed}, one for each of the 2" in lines[0]
    assert "take more samples or fewer ranks" in lines[0] and not (tmp_path / "out").exists()


def test_damaged_weights_end_both_ranks(model, token_file, tmp_path):
    edit_tensor(model, "model.layers.0.mlp.up_proj.weight", lambda tensor: with_value(tensor, torch.nan))
    lines = failing_launch(quantize_arguments(model, token_file, tmp_path / "out"))
    assert len(lines) == 1 and "model.layers.0.mlp.up_proj.weight holds nan" in lines[0]


@pytest.mark.parametrize("name", ["LICENSE", "generation_config.json", "config.json", "additional_chat_templates"])
def test_link_out_of_the_folder_is_refused_before_work_starts(llama, token_file, tmp_path, name):
    model = shutil.copytree(llama, tmp_path / "model")
    secret = tmp_path / "secret"
    secret.mkdir() if name == "additional_chat_templates" else shutil.copyfile(llama / "config.json", secret)
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(secret)
    if secret.is_dir():
        (secret / "a.jinja").write_text("words")
    with pytest.raises(errors.CheckpointError, match=f"{name}.*: a link out of the folder"):
        run_quantize(model, token_file, tmp_path / "out")
    assert not (tmp_path / "out").exists()
