"""Blocks that are done again: damaged ones come out as they were; others with all that follows from them."""

import json
import shutil
from pathlib import Path

import pytest

from runs import ONE_RANK, committed, result_files, run_quantize
from shardq.cli import parse
from shardq.commands.verify import verify
from shardq.errors import ConfigError, ResumeError, Stopped
from shardq.formats.block_file import read_block
from shardq.rundir.ledger import read_lines
from shardq.rundir.record import RunRecord

BLOCK = "blocks/block-00001.safetensors"
SHARD, LAST_SHARD = "model-00002-of-00004.safetensors", "model-00003-of-00004.safetensors"
ENCODINGS = "encodings/block-00002.json"
OTHER = ["--optimize.iterations", 6]


@pytest.fixture(scope="module")
def original(llama, token_file, tmp_path_factory) -> Path:
    """A finished run. Read only."""
    output = tmp_path_factory.mktemp("original") / "out"
    run_quantize(llama, token_file, output)
    return output


@pytest.fixture
def output(original, tmp_path) -> Path:
    """A copy of it."""
    return shutil.copytree(original, tmp_path / "out")


@pytest.fixture(scope="module")
def changed(original, llama, token_file, tmp_path_factory) -> Path:
    """What block 0 of it and the other settings lead to: a run that knew them from the start, after block 0."""
    output = shutil.copytree(original, tmp_path_factory.mktemp("changed") / "out")
    ledger, manifest = output / "ledger.jsonl", output / "manifest.json"
    ledger.write_text(ledger.read_text().splitlines(keepends=True)[0])
    manifest.write_text(manifest.read_text().replace('"iterations": 24', '"iterations": 6'))
    run_quantize(llama, token_file, output, *OTHER)
    return output


def flip_last_bit(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def trained(output: Path) -> list[int]:
    """Blocks that were trained, in that order."""
    events = [json.loads(line) for line in (output / "events.jsonl").read_text().splitlines()]
    return [event["block"] for event in events if event["span"] == "train"]


def files_but_ledger(output: Path) -> dict[str, bytes]:
    return {name: content for name, content in result_files(output).items() if name != "ledger.jsonl"}


DAMAGES = {  # what is done, what the refusal names and proposes, what would not do, which blocks are trained again
    "a flipped bit": (lambda o: flip_last_bit(o / BLOCK), f"{BLOCK}: changed", "1", "2", [1]),
    "a missing shard": (lambda o: (o / SHARD).unlink(), f"{SHARD}: missing", "1", "0,end", [1]),
    "encodings cut off": (lambda o: (o / ENCODINGS).write_text("{"), f"{ENCODINGS}: changed", "2", "end", [2]),
    "two blocks and the end": (
        lambda o: [(o / name).unlink() for name in (BLOCK, ENCODINGS, "config.json")],
        f"{BLOCK}: missing", "1,2,end", "1", [1, 2],
    ),
}  # fmt: skip


QUICK = ("a flipped bit",)


@pytest.mark.parametrize(
    "damage, named, proposed, too_little, again",
    [pytest.param(*case, id=name, marks=[pytest.mark.slow] * (name not in QUICK)) for name, case in DAMAGES.items()],
)
def test_damage_is_mended_only_when_asked(
    original, output, llama, token_file, damage, named, proposed, too_little, again
):
    damage(output)
    before = result_files(output)
    for redo in ([], ["--redo", too_little]):
        with pytest.raises(ResumeError) as caught:
            run_quantize(llama, token_file, output, *redo)
        assert named in str(caught.value) or (redo and ENCODINGS in str(caught.value))
        assert str(caught.value).endswith(f"restore it, or do it again with --redo {proposed}")
        assert result_files(output) == before, "refused, and yet something was changed"
    run_quantize(llama, token_file, output, "--redo", proposed)
    assert trained(output) == [0, 1, 2, *again]
    assert files_but_ledger(output) == files_but_ledger(original)
    verify(parse("verify", [str(output)]), ONE_RANK)


ENDS = {
    "everything that completes it": ["config.json", "generation_config.json", "model.safetensors.index.json",
                                     "model.encodings", "model_torch.encodings", "model-00004-of-00004.safetensors"],
    "the manifest": ["manifest.json"],
}  # fmt: skip


@pytest.mark.parametrize("damage", [Path.unlink, flip_last_bit], ids=["missing", "changed"])
@pytest.mark.parametrize("names", ENDS.values(), ids=ENDS)
def test_same_command_mends_what_completes_a_run(original, output, llama, token_file, capsys, names, damage):
    for name in names:
        damage(output / name)
    run_quantize(llama, token_file, output)
    assert result_files(output) == result_files(original)
    said = capsys.readouterr().out
    assert said.count("; written again") == len(names) and "nothing is left to do" in said
    assert trained(output) == [0, 1, 2]


def test_large_files_of_a_finished_run_are_compared_by_size(original, output, llama, token_file, monkeypatch):
    monkeypatch.setattr("shardq.rundir.digests.SMALL_BYTES", 0)
    flip_last_bit(output / SHARD)
    run_quantize(llama, token_file, output)
    with pytest.raises(ResumeError, match=f"damaged .*{SHARD}: changed since it was finished"):
        verify(parse("verify", [str(output)]), ONE_RANK)
    (output / SHARD).write_bytes((original / SHARD).read_bytes()[:-1])
    with pytest.raises(ResumeError, match=f"{SHARD}: changed.* bytes, it had .*do it again with --redo 1"):
        run_quantize(llama, token_file, output)


def test_what_does_not_come_out_as_it_was_is_said(output, llama, token_file, monkeypatch):
    (output / "model.encodings").unlink()
    monkeypatch.setattr("shardq.rundir.block_output.merge_encodings", lambda *_: (output / "model.encodings").touch())
    with pytest.raises(ResumeError, match="model.encodings: does not come out as it was; restore it, or .*--redo end"):
        run_quantize(llama, token_file, output)


def test_ledger_records_what_was_done_again(output, llama, token_file):
    before = read_lines(output)
    run_quantize(llama, token_file, output, "--redo", "1")
    lines = read_lines(output)
    assert lines[:4] == before and lines[5:] == [before[1], before[3]]
    assert lines[4] == {"redo": [1], "manifest": json.loads((output / "manifest.json").read_text())}


def test_blocks_from_the_first_on_are_made_with_other_settings(output, changed, llama, token_file):
    run_quantize(llama, token_file, output, "--redo", "1", *OTHER)
    assert trained(output) == [0, 1, 2, 1, 2]
    assert {**files_but_ledger(output), "manifest.json": b""} == {**files_but_ledger(changed), "manifest.json": b""}
    assert RunRecord.read(output).manifest()["options"]["optimize"]["iterations"] == 6
    verify(parse("verify", [str(output)]), ONE_RANK)
    with pytest.raises(ResumeError, match=r"optimize.iterations \(was 6, is 24\)"):
        run_quantize(llama, token_file, output)
    run_quantize(llama, token_file, output, *OTHER)  # the command without --redo knows the run again


def test_same_command_goes_on_with_a_redo_and_does_not_begin_it_anew(output, changed, llama, token_file):
    arguments = ["--redo", "1", *OTHER]
    with pytest.raises(Stopped, match="2 of 3 blocks are done"):
        run_quantize(llama, token_file, output, *arguments, stop_after=1)
    with pytest.raises(ResumeError, match="not finished, 2 block"):
        verify(parse("verify", [str(output)]), ONE_RANK)
    assert not (output / "config.json").exists(), "a mixture of blocks could be loaded"
    for _ in range(2):  # the second time there is nothing to do
        run_quantize(llama, token_file, output, *arguments)
        assert trained(output) == [0, 1, 2, 1, 2] and committed(output) == 4 + 1 + 3
    assert files_but_ledger(output)[BLOCK] == files_but_ledger(changed)[BLOCK]


@pytest.mark.slow
def test_block_that_is_damaged_again_is_done_again(original, output, llama, token_file):
    for times in (1, 2):
        flip_last_bit(output / BLOCK)
        run_quantize(llama, token_file, output, "--redo", "1")
        assert trained(output) == [0, 1, 2, *times * [1]]
    assert files_but_ledger(output) == files_but_ledger(original)


@pytest.mark.slow
def test_unfinished_run_keeps_its_other_blocks(original, llama, token_file, tmp_path):
    output = tmp_path / "out"
    with pytest.raises(Stopped):
        run_quantize(llama, token_file, output, stop_after=1)
    flip_last_bit(output / "blocks" / "block-00000.safetensors")
    run_quantize(llama, token_file, output, "--redo", "0")
    assert trained(output) == [0, 1, 0, 2]
    assert files_but_ledger(output) == files_but_ledger(original)


@pytest.mark.slow
def test_activations_of_former_blocks_are_never_used(original, changed, llama, token_file, tmp_path):
    """An unfinished run's cache holds what enters block 2; block 1 with other settings makes that worthless."""
    output, disk = tmp_path / "out", ["--cache.folder", tmp_path / "disk"]
    for more in ([], ["--redo", "1", *OTHER]):
        with pytest.raises(Stopped):
            run_quantize(llama, token_file, output, *disk, *more, stop_after=1)
        if not more:
            shutil.copytree(tmp_path / "disk", tmp_path / "elsewhere")
    # Another host's disk, where nobody has cleaned up.
    shutil.copytree(tmp_path / "elsewhere", tmp_path / "disk", dirs_exist_ok=True)
    run_quantize(llama, token_file, output, *disk, *OTHER)
    assert (output / LAST_SHARD).read_bytes() == (changed / LAST_SHARD).read_bytes()


def test_exports_are_renewed_with_the_blocks(original, llama, token_file, tmp_path, capsys):
    output = shutil.copytree(original, tmp_path / "out")
    run_quantize(llama, token_file, output, "--export.formats", '["hf", "compressed-tensors"]')
    before = (output / "hf" / SHARD).read_bytes()
    run_quantize(llama, token_file, output, "--redo", "1", *OTHER, "--export.formats", "hf")
    assert (output / "hf" / SHARD).read_bytes() != before
    assert (output / "hf" / LAST_SHARD).exists()
    assert not (output / "compressed-tensors").exists()
    said = capsys.readouterr().out
    assert f"{output}/compressed-tensors: removed; shardq export {output} --format compressed-tensors" in said
    assert f"{output}/hf: removed" not in said


@pytest.mark.parametrize("redo", ["3", "0-3", "2-1", "1,", "one", "-1", "1--2", "0x1", "", "1 2 3 4 5"])
def test_blocks_that_there_are_not_are_refused(output, llama, token_file, redo):
    before = result_files(output)
    with pytest.raises(ConfigError, match="redo: .* must be blocks from 0 to 2 such as 3,12-14, or end"):
        run_quantize(llama, token_file, output, f"--redo={redo}")
    assert result_files(output) == before


@pytest.mark.parametrize(
    "more, named",
    [
        (["--quant.bits", 3], "quant.bits (was 4, is 3)"),
        (["--quant.ignore", "*.q_proj"], "quant.ignore"),
        (["--export.dtype", "source"], "export.dtype (was float32, is source)"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_all_blocks_share_cannot_change(output, llama, token_file, more, named):
    before = result_files(output)
    with pytest.raises(ResumeError) as caught:
        run_quantize(llama, token_file, output, "--redo", "1", *more)
    assert named in str(caught.value) and result_files(output) == before


def test_folder_without_a_run_has_nothing_to_do_again(llama, token_file, tmp_path):
    with pytest.raises(ResumeError, match="no run to redo blocks of"):
        run_quantize(llama, token_file, tmp_path / "out", "--redo", "1")
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.slow
def test_other_method_and_data_may_follow(output, llama, token_file):
    run_quantize(llama, token_file, output, "--redo", "2", "--quant.method", "rtn", "--calib.samples", 6)
    assert [len(read_block(path)) for path in sorted((output / "blocks").iterdir())] == [7, 7, 7]
    assert len(RunRecord.read(output).entries) == 4
