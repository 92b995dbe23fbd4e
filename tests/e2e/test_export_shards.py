"""Further checkpoints are written a shard a block while the run goes on, and are those that an export later makes."""

import json
import shutil
from pathlib import Path

import pytest

from runs import ONE_RANK, committed, result_files, run_quantize
from shardq.cli import parse
from shardq.commands.export import export
from shardq.errors import Stopped

RTN = ("--quant.method", "rtn")
FORMATS = ("compressed-tensors", "gptq", "hf")
ASKED = ("--export.formats", json.dumps(FORMATS))
SHARDS = [f"model-0000{number}-of-00004.safetensors" for number in (1, 2, 3, 4)]


@pytest.fixture(scope="module")
def finished(llama: Path, token_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run without further formats. Read only."""
    output = tmp_path_factory.mktemp("finished") / "out"
    run_quantize(llama, token_file, output, *RTN)
    return output


def exported(run: Path, folder: Path, *formats: str) -> dict[str, bytes]:
    """What exporting a finished run makes, by the paths that these files have in a run that was asked for them."""
    for chosen in formats:
        export(parse("export", [str(run), "--format", chosen, "--output", str(folder / chosen)]), ONE_RANK)
    return result_files(folder)


def in_formats(output: Path) -> dict[str, bytes]:
    return {name: content for name, content in result_files(output).items() if name.split("/")[0] in FORMATS}


def test_shards_are_there_before_their_block_counts(finished, llama, token_file, tmp_path):
    output, seen = tmp_path / "out", {}

    def look(block: int | None) -> None:
        assert committed(output) == len(seen)
        seen[block] = {chosen: sorted(path.name for path in (output / chosen).iterdir()) for chosen in FORMATS}

    run_quantize(llama, token_file, output, *RTN, *ASKED, on_commit=look)
    for block in range(3):
        assert seen[block] == dict.fromkeys(FORMATS, SHARDS[: block + 1])
    assert all({*SHARDS, "config.json", "README.md"} <= set(names) for names in seen[None].values())
    found = result_files(tmp_path / "out")
    assert in_formats(tmp_path / "out") == exported(finished, tmp_path / "later", *FORMATS)
    assert {name: found[name] for name in result_files(finished)} == result_files(finished), "the run itself differs"


def test_resume_neither_loses_nor_repeats_shards(finished, llama, token_file, tmp_path):
    output = tmp_path / "out"
    with pytest.raises(Stopped):
        run_quantize(llama, token_file, output, *RTN, *ASKED, stop_after=1)
    before = {path: path.stat().st_mtime_ns for chosen in FORMATS for path in (output / chosen).iterdir()}
    assert len(before) == 2 * len(FORMATS)
    run_quantize(llama, token_file, output, *RTN, *ASKED)
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert in_formats(output) == exported(finished, tmp_path / "later", *FORMATS)


def test_formats_may_be_asked_for_in_between(finished, llama, token_file, tmp_path, capsys):
    """Blocks that are finished without them get their shards at the end; a run that does not ask keeps none."""
    output = tmp_path / "out"
    for block, asked in ((0, ASKED), (1, ())):
        with pytest.raises(Stopped):
            run_quantize(llama, token_file, output, *RTN, *asked, stop_after=block)
        assert (output / "gptq").exists() == bool(asked)
    assert f"{output}/gptq: removed; shardq export" in capsys.readouterr().out
    run_quantize(llama, token_file, output, *RTN, *ASKED)
    assert in_formats(output) == exported(finished, tmp_path / "later", *FORMATS)


def int8_export(output: Path) -> None:
    """Export a run to the folder that it would write itself, with other options."""
    export(parse("export", [str(output), "--activation_bits", "8"]), ONE_RANK)


def test_redo_keeps_no_shard_of_another_export(finished, llama, token_file, tmp_path, capsys):
    output = shutil.copytree(finished, tmp_path / "out")
    int8_export(output)
    redo = ["--redo", 1, "--optimize.iterations", 2, "--export.formats", "compressed-tensors"]
    run_quantize(llama, token_file, output, *redo)
    assert "removed" not in capsys.readouterr().out
    assert in_formats(output) == exported(output, tmp_path / "later", "compressed-tensors")
    assert (output / SHARDS[1]).read_bytes() != (finished / SHARDS[1]).read_bytes()


def test_finished_run_keeps_no_shard_of_an_export_that_was_cut_short(finished, llama, token_file, tmp_path):
    output = shutil.copytree(finished, tmp_path / "out")
    int8_export(output)
    (output / "compressed-tensors" / "README.md").unlink()
    run_quantize(llama, token_file, output, *RTN, "--export.formats", "compressed-tensors")
    assert in_formats(output) == exported(finished, tmp_path / "later", "compressed-tensors")


def test_redo_that_is_cut_short_as_it_begins_leaves_no_half_of_an_export(
    finished, llama, token_file, tmp_path, monkeypatch
):
    output = shutil.copytree(finished, tmp_path / "out")
    run_quantize(llama, token_file, output, *RTN, *ASKED)
    whole, (folder, shard) = in_formats(output), (output / "gptq", SHARDS[2])

    def cut_short(removed: Path, **options: object) -> None:
        if removed == folder:
            (folder / shard).unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("shardq.files.shutil.rmtree", cut_short)
        with pytest.raises(KeyboardInterrupt):
            run_quantize(llama, token_file, output, *RTN, *ASKED, "--redo", 1)
    run_quantize(llama, token_file, output, *RTN, *ASKED)
    assert in_formats(output) == whole
