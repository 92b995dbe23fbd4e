"""Room on the disks: counted before work starts, and said when it ends all the same; the run goes on with more."""

import re
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import OPTConfig

import forked
import tiny
from runs import LAUNCH, ONE_RANK, committed, failing_launch, quantize_arguments, result_files, run_quantize
from shardq.cli import parse
from shardq.commands import space, tune
from shardq.commands.export import export
from shardq.commands.prepare import Run, prepare
from shardq.commands.quantize import quantize
from shardq.errors import Stopped, StorageError
from shardq.export import write
from shardq.formats.tensor_file import write_checked
from shardq.logs import Display
from shardq.optimize.stepper import OPTIMIZERS
from shardq.rundir import room
from shardq.rundir.folder import RunFolder
from shardq.rundir.room import bytes_there


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


def fill(disk: Path, leave: int = 0) -> Path:
    """A file that takes all room, but for some bytes."""
    ballast = disk / "ballast"
    with suppress(OSError), open(ballast, "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    with open(ballast, "r+b") as file:
        file.truncate(max(0, ballast.stat().st_size - leave))
    return ballast


def predicted(arguments: list[str]) -> dict[str, int]:
    """Bytes that a run says it will write, by what they are."""
    with ExitStack() as held:
        run = prepare(parse("quantize", arguments), ONE_RANK, Display(1), held)
        return {need.what: need.num_bytes for need in space.needed(run)}


@pytest.mark.parametrize("where", ["output", "cache"])
def test_run_that_will_not_fit_is_refused_before_it_begins(small_disk, llama, token_file, tmp_path, where):
    fill(small_disk, leave=400_000)
    output = small_disk / "out" if where == "output" else tmp_path / "out"
    more = [] if where == "output" else ["--cache.folder", small_disk / "cache"]
    with pytest.raises(StorageError) as caught:
        run_quantize(llama, token_file, output, *more)
    named, size, parts, options = {
        "output": (output, r"1\.\d MB", r"weights and encodings 1\.\d MB, activations 53\d\.\d kB",
                   r"--output or --cache\.folder"),
        "cache": (small_disk / "cache", r"53\d\.\d kB", r"activations 53\d\.\d kB", r"--cache\.folder"),
    }[where]  # fmt: skip
    assert re.fullmatch(
        rf"{named}: {size} are still to be written there \({parts}\), 39\d\.\d kB are free; make room, or choose "
        rf"another {options}", str(caught.value),
    )  # fmt: skip
    assert result_files(output) == {}


def test_activations_are_as_wide_as_what_enters_a_block(token_file, tmp_path):
    sizes = {"vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 96}
    folder = tiny.save_model(tmp_path / "model", OPTConfig(**sizes, word_embed_proj_dim=32, max_position_embeddings=64))
    num_bytes = predicted(quantize_arguments(folder, token_file, tmp_path / "out"))["activations"]
    three_generations = 3 * 8 * 64 * 64 * 4  # of 8 samples of 64 tokens, in float32
    assert three_generations <= num_bytes < 1.1 * three_generations


def test_what_blocks_are_passed_of_the_sample_and_of_earlier_blocks_is_counted(tmp_path):
    model = tiny.save_model(tmp_path / "model", tiny.GEMMA4)
    tokens = tiny.save_tokens(tmp_path / "tokens.safetensors", vocab=200)
    arguments, cached = quantize_arguments(model, tokens, tmp_path / "out", "--quant.method", "rtn"), []
    counted = predicted(arguments)["activations"]
    cache = tmp_path / "out" / "cache"
    quantize(parse("quantize", arguments), ONE_RANK, lambda block: cached.append(bytes_there(cache)))
    assert max(cached) <= counted <= 1.2 * max(cached)


def test_disks_are_told_apart_by_their_file_system(small_disk, llama, token_file, tmp_path):
    """Each alone has room for its part only."""
    fill(small_disk, leave=900_000)
    run_quantize(llama, token_file, tmp_path / "out", "--cache.folder", small_disk, "--optimize.iterations", 1)


def test_resumed_run_needs_room_for_what_is_left_alone(llama, token_file, tmp_path, monkeypatch):
    output, seen = tmp_path / "out", []

    def note(run: Run) -> None:
        seen.append((sum(need.num_bytes for need in space.needed(run)), bytes_there(output)))

    monkeypatch.setattr("shardq.commands.quantize.check_space", note)
    for block in range(3):
        with suppress(Stopped):
            run_quantize(llama, token_file, output, "--quant.method", "rtn", stop_after=block)
    (everything, _), *later = seen
    assert later[0][1] > 0.3 * everything and later[1][1] > later[0][1]
    assert all(abs(needed + there - everything) < 0.05 * everything for needed, there in later)


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["--quant.symmetric", "false", "--quant.group_size", 32, "--export.dtype", "source"],
        ["--quant.bits", 3, "--quant.ignore", "*.q_proj", "--cache.placement", "cpu"],
        ["--export.formats", '["hf", "compressed-tensors"]'],
        ["--export.formats", "compressed-tensors", "--export.activation_bits", 8],
    ],
    ids=["default", "groups", "three bits", "formats", "int8 activations"],
)
def test_what_is_counted_is_what_is_written(llama, token_file, tmp_path, more):
    output, cached = tmp_path / "out", [0]

    arguments = quantize_arguments(llama, token_file, output, "--quant.method", "rtn", *more)
    counted = predicted(arguments)
    quantize(parse("quantize", arguments), ONE_RANK, lambda block: cached.append(bytes_there(output / "cache")))
    small = ("manifest.json", "ledger.jsonl")
    written = sum(len(content) for name, content in result_files(output).items() if name not in small)
    assert written <= counted["weights and encodings"] * 1.02 and counted["weights and encodings"] < 1.15 * written
    assert max(cached) <= counted.get("activations", 0) <= 1.05 * max(cached)


@pytest.fixture(scope="module")
def finished(llama: Path, token_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run. Read only."""
    output = tmp_path_factory.mktemp("finished") / "out"
    run_quantize(llama, token_file, output, "--quant.method", "rtn")
    return output


def test_export_that_will_not_fit_is_refused_before_it_begins(finished, tmp_path, monkeypatch):
    counted = []
    monkeypatch.setattr(write, "check_room", lambda needs: counted.extend(needs))
    export(parse("export", [str(finished), "--format", "hf", "--output", str(tmp_path / "hf")]), ONE_RANK)
    assert 0.85 * bytes_there(tmp_path / "hf") < counted[0].num_bytes < 1.05 * bytes_there(tmp_path / "hf")
    monkeypatch.undo()
    monkeypatch.setattr(room.shutil, "disk_usage", lambda _: SimpleNamespace(free=counted[0].num_bytes - 1))
    for folder, more in ((tmp_path / "other", ["--output", str(tmp_path / "other")]), (finished / "hf", [])):
        with pytest.raises(StorageError, match=f"{folder}: .* are still to be written there .hf .*another --output"):
            export(parse("export", [str(finished), "--format", "hf", *more]), ONE_RANK)
        assert not folder.exists()


def test_tuning_that_will_not_fit_is_refused_before_it_begins(finished, llama, tmp_path, monkeypatch):
    arguments = [str(finished), "--model", str(llama), "--output", str(tmp_path / "out"), "--tune.steps", "1"]
    largest, saved = [0], tune.write_checked

    def look(*args: object) -> None:
        saved(*args)
        largest.append(bytes_there(RunFolder(tmp_path / "out").tuning_state))

    def note(needs: list[room.Need]) -> None:
        counted.update({need.what: need.num_bytes for need in needs})

    counted = {}
    monkeypatch.setattr(space, "check_room", note)
    monkeypatch.setattr(tune, "write_checked", look)
    tune.tune(parse("tune", arguments), ONE_RANK)
    written = bytes_there(tmp_path / "out") + max(largest)
    assert 0.95 * written < counted["weights, encodings and state"] < 1.2 * written
    monkeypatch.undo()
    monkeypatch.setattr(room.shutil, "disk_usage", lambda _: SimpleNamespace(free=sum(counted.values()) - 1))
    arguments[4] = str(tmp_path / "other")
    with pytest.raises(StorageError, match="weights, encodings and state .*, activations .*another --output or --cach"):
        tune.tune(parse("tune", arguments), ONE_RANK)
    assert not (tmp_path / "other" / "manifest.json").exists()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_room_for_checkpoints_is_what_they_take(llama, token_file, tmp_path, monkeypatch, optimizer):
    output, there = tmp_path / "out", []

    def look(path: Path, *args: object, **facts: object) -> None:
        write_checked(path, *args, **facts)
        there.append(bytes_there(output / "checkpoint"))

    monkeypatch.setattr("shardq.training.checkpoint.write_checked", look)
    more = ["--checkpoint.every_iterations", 2, "--optimize.optimizer", optimizer]
    arguments = quantize_arguments(llama, token_file, output, *more)
    counted = predicted(arguments)["checkpoints"]
    quantize(parse("quantize", arguments), ONE_RANK)
    assert 0.9 * counted < max(there) < 1.1 * counted


def test_full_disk_ends_both_ranks_and_the_run_goes_on_with_room(small_disk, llama, token_file, two_ranks):
    """Somebody else takes what was free when the run began."""
    output = small_disk / "out"
    arguments = quantize_arguments(llama, token_file, output)

    def fill_later() -> None:
        deadline = time.monotonic() + tiny.LAUNCH_TIMEOUT_SECONDS
        while committed(output) < 1 and time.monotonic() < deadline:
            time.sleep(0.005)
        fill(small_disk)

    other = threading.Thread(target=fill_later)
    other.start()
    lines = failing_launch(arguments)
    other.join()
    assert any("no space left" in line.lower() for line in lines), lines
    assert not list(small_disk.rglob("*.partial")) and 1 <= committed(output) < 4
    (small_disk / "ballast").unlink()
    assert forked.ranks(2, [LAUNCH / "quantize.py", *arguments]).returncode == 0
    assert result_files(output) == result_files(two_ranks[0])
