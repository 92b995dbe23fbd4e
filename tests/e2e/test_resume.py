"""Interrupted runs go on and end with the bytes of an uninterrupted one."""

import os
import shutil

import pytest

import forked
import tiny
from runs import LAUNCH, committed, quantize_arguments, result_files, run_quantize, start_and_kill
from shardq.errors import ResumeError, Stopped, StorageError
from shardq.rundir.lock import only_run


@pytest.fixture(scope="module")
def uninterrupted(llama, token_file, tmp_path_factory):
    output = tmp_path_factory.mktemp("uninterrupted") / "out"
    run_quantize(llama, token_file, output)
    return output


@pytest.mark.parametrize(
    "num_ranks, placement",
    [
        (1, "disk"),
        (2, "disk"),
        pytest.param(1, "cpu", marks=pytest.mark.slow),
        pytest.param(2, "cpu", marks=pytest.mark.slow),
    ],
)
def test_killed_run_ends_with_the_same_bytes(llama, token_file, tmp_path, num_ranks, placement):
    # Enough iterations that the kill comes while the next block is trained.
    arguments = quantize_arguments(
        llama, token_file, tmp_path / "out", "--cache.placement", placement, "--optimize.iterations", 60
    )
    assert start_and_kill(num_ranks, arguments, tmp_path / "out", after_blocks=1) != 0
    assert 1 <= committed(tmp_path / "out") < 4
    resumed = forked.ranks(num_ranks, [LAUNCH / "quantize.py", *arguments])
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming" in resumed.stdout
    arguments[arguments.index("--output") + 1] = str(tmp_path / "whole")
    assert forked.ranks(num_ranks, [LAUNCH / "quantize.py", *arguments]).returncode == 0
    assert result_files(tmp_path / "out") == result_files(tmp_path / "whole")


def cut_ledger(output, num_blocks):
    """Take a finished run back to where some blocks are committed and their successors' files are litter."""
    lines = (output / "ledger.jsonl").read_text().splitlines(keepends=True)
    (output / "ledger.jsonl").write_text("".join(lines[:num_blocks]))


def test_run_on_two_level_scales_goes_on(llama, token_file, tmp_path):
    more = ["--quant.group_size", 16, "--quant.decompressed_bits", 8, "--optimize.iterations", 6]
    run_quantize(llama, token_file, tmp_path / "whole", *more)
    shutil.copytree(tmp_path / "whole", tmp_path / "out")
    cut_ledger(tmp_path / "out", 1)
    run_quantize(llama, token_file, tmp_path / "out", *more)
    assert result_files(tmp_path / "out") == result_files(tmp_path / "whole")


@pytest.mark.parametrize("num_blocks", [0, 1, 2, 3])
def test_lost_activations_are_computed_again(uninterrupted, llama, token_file, tmp_path, capsys, num_blocks):
    shutil.copytree(uninterrupted, tmp_path / "out")
    cut_ledger(tmp_path / "out", num_blocks)
    run_quantize(llama, token_file, tmp_path / "out")
    again = [line for line in capsys.readouterr().out.splitlines() if line.startswith("activations again")]
    replayed = num_blocks if num_blocks < 3 else 0  # nothing is left but what completes the run
    assert again == [f"activations again, block {number + 1}/{num_blocks}" for number in range(replayed)]
    assert result_files(tmp_path / "out") == result_files(uninterrupted)


def test_finished_run_is_left_as_it_is(uninterrupted, llama, token_file):
    before = {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*")}
    summary = run_quantize(llama, token_file, uninterrupted)
    assert summary["blocks"] == 3 and summary["loss_after"] < summary["loss_before"]
    assert before == {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*")}


@pytest.mark.parametrize(
    "more, named",
    [
        (["--quant.bits", 3], "quant.bits (was 4, is 3)"),
        (["--seed", 7], "seed (was 0, is 7)"),
        (["--optimize.grid_lr", 0.01], "optimize.grid_lr (was 0.001, is 0.01)"),
        (["--calib.samples", 6], "calib.samples (was 8, is 6)"),
        (["--optimize.micro_batch", 1], "optimize.micro_batch (was 2, is 1)"),
        (["--optimize.batch_size", 4], "optimize.batch_size (was 2, is 4)"),
        (["--optimize.precision", "bf16"], "optimize.precision (was float32, is bf16)"),
    ],
    ids=lambda value: str(value[0]) if isinstance(value, list) else "",
)
def test_resume_names_the_options_that_differ(uninterrupted, llama, token_file, more, named):
    with pytest.raises(ResumeError) as error:
        run_quantize(llama, token_file, uninterrupted, *more)
    assert named in str(error.value)


def test_resume_refuses_another_model(uninterrupted, token_file, tmp_path):
    other = tiny.save_llama(tmp_path / "other", seed=1)
    with pytest.raises(ResumeError, match=r"model\.weights"):
        run_quantize(other, token_file, uninterrupted)


def test_resume_refuses_another_dataset(uninterrupted, llama, tmp_path):
    other = tiny.save_tokens(tmp_path / "other.safetensors", seed=1)
    with pytest.raises(ResumeError, match="calibration_tokens"):
        run_quantize(llama, other, uninterrupted)


def test_resume_refuses_a_damaged_block(uninterrupted, llama, token_file, tmp_path):
    shutil.copytree(uninterrupted, tmp_path / "out")
    file = tmp_path / "out" / "blocks" / "block-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ResumeError, match=r"block-00001\.safetensors: changed"):
        run_quantize(llama, token_file, tmp_path / "out")


def test_run_keeps_its_micro_batch_whatever_memory_is_free(llama, token_file, tmp_path, monkeypatch):
    with monkeypatch.context() as crowded:
        crowded.setattr("shardq.training.memory.spare_bytes", lambda device, ranks: 0)
        run_quantize(llama, token_file, tmp_path / "out")
    files = result_files(tmp_path / "out")
    assert b'"micro_batch": 1' in files["manifest.json"]
    run_quantize(llama, token_file, tmp_path / "out")  # with today's memory it would be 2, another run
    assert result_files(tmp_path / "out") == files


def test_second_run_on_one_folder_is_refused(llama, token_file, tmp_path):
    with only_run(tmp_path / "out", print):
        with pytest.raises(ResumeError, match=rf"out: process {os.getpid()} on .* works there"):
            run_quantize(llama, token_file, tmp_path / "out")
        assert [file.name for file in (tmp_path / "out").iterdir()] == ["lock"]
    run_quantize(llama, token_file, tmp_path / "out", "--quant.method", "rtn")
    assert "lock" not in result_files(tmp_path / "out")


@pytest.mark.parametrize("generation, stream", [(1, "quant"), (1, "fp"), (2, "quant")])
def test_flipped_bit_in_the_cache_never_reaches_the_result(
    uninterrupted, llama, token_file, tmp_path, generation, stream
):
    """Found by the pass that reads it, or by the resume: either way the activations are computed anew."""

    def flip(block):
        if block == generation - 1:
            file = tmp_path / "out" / "cache" / f"generation-{generation:05d}" / f"{stream}-000003.safetensors"
            file.write_bytes(file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 1]))

    with pytest.raises(Stopped):  # a resume meets the next generation
        run_quantize(llama, token_file, tmp_path / "out", on_commit=flip, stop_after=0)
    if generation == 2:
        with pytest.raises(
            StorageError, match=rf"generation-00002/{stream}-000003.safetensors: cached activations are"
        ):
            run_quantize(llama, token_file, tmp_path / "out", on_commit=flip)
    run_quantize(llama, token_file, tmp_path / "out")
    assert result_files(tmp_path / "out") == result_files(uninterrupted)
