"""Every kind of damage to every file of a finished run and its exports is found by `verify`."""

import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import tiny
from runs import ONE_RANK, run_quantize
from shardq.cli import parse
from shardq.commands.export import export
from shardq.commands.verify import find_faults, verify
from shardq.errors import ResumeError
from test_gguf import add_bpe

LOG = "events.jsonl"  # of which a number may be another: no promise is made of times
FEW = ("compressed-tensors", "hf", "aimet")
STRAYS = ("model-00009-of-00009.safetensors", "generation_config.json.bak", "more/tokens.json")


def finished(folder: Path, formats: tuple[str, ...]) -> Path:
    """A finished run of a model with companions, exported."""
    model, output = tiny.save_llama(folder / "model", num_blocks=2), folder / "out"
    add_bpe(model)
    tokens = tiny.save_tokens(folder / "tokens.safetensors", num=4)
    asked = f"[{','.join(formats)}]"
    run_quantize(model, tokens, output, "--calib.samples", 4, "--quant.method", "rtn", "--quant.group_size", 32,
                 "--export.formats", asked)  # fmt: skip
    return output


def flip(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def cut(path: Path, draw: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: draw.randrange(len(content))])


def remove(path: Path, draw: random.Random) -> None:
    path.unlink()


def extend(path: Path, draw: random.Random) -> None:
    path.write_bytes(path.read_bytes() + b"{")


DAMAGES = (flip, cut, remove, extend)


def done_to(output: Path, name: str, damage: Callable[[Path, random.Random], None], draw: random.Random) -> list[str]:
    """What `verify` finds wrong once a file is damaged; the file is put back."""
    path = output / name
    before = path.read_bytes()
    damage(path, draw)
    if path.exists() and path.read_bytes() == before:
        return ["as it was"]
    try:
        return found_in(output)
    finally:
        path.write_bytes(before)


def found_in(output: Path) -> list[str]:
    try:
        faults, _, _ = find_faults(output)
    except ResumeError as error:
        return [str(error)]
    return [fault for found in faults.values() for fault in found]


def added_to(output: Path) -> Iterator[tuple[str, list[str]]]:
    """What is found once a file is added, to each folder; it is taken away again."""
    for folder in [output, *(path for path in output.rglob("*") if path.is_dir())]:
        for name in STRAYS:
            stray = folder / name
            stray.parent.mkdir(exist_ok=True)
            stray.write_bytes(b"x")
            yield f"{stray.relative_to(output)}", found_in(output)
            shutil.rmtree(stray.parent) if "/" in name else stray.unlink()


def files_of(output: Path) -> list[str]:
    return sorted(str(path.relative_to(output)) for path in output.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with three exports. Each test leaves it as it was."""
    return finished(tmp_path_factory.mktemp("few"), FEW)


def test_one_damage_to_a_file_of_each_kind_is_found(few: Path):
    draw, kinds = random.Random(0), {}
    for name in files_of(few):
        kinds.setdefault(f"{Path(name).parent}/{Path(name).suffix}", name)
    assert len(kinds) > 12 and found_in(few) == []
    for number, name in enumerate(kinds.values()):
        damage = DAMAGES[number % len(DAMAGES)]
        if name != LOG:
            found = done_to(few, name, damage, draw)
            assert found and all("\n" not in fault for fault in found), (name, damage.__name__)


def test_files_that_were_added_are_named(few: Path):
    for name, found in list(added_to(few))[:6]:
        assert any(name in fault and "move it elsewhere" in fault for fault in found), name
    assert found_in(few) == []


def test_a_line_of_the_events_that_is_no_json_is_named(few: Path):
    found = done_to(few, LOG, lambda path, draw: path.write_bytes(b"{}\n" + path.read_bytes()[5:]), random.Random(0))
    assert any(f"{LOG}: line 2 is no JSON" in fault for fault in found)
    found = done_to(few, LOG, lambda path, draw: path.write_bytes(path.read_bytes()[:-9]), random.Random(0))
    assert any(f"{LOG}: its last line is cut off" in fault for fault in found)


def test_an_export_elsewhere_is_verified_by_itself(few: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    folder = tmp_path / "served"
    export(parse("export", [str(few), "--output", str(folder)]), ONE_RANK)
    summary = verify(parse("verify", [str(folder)]), ONE_RANK)
    assert summary == {"output": str(folder), "format": "compressed-tensors", "files": len(files_of(folder)) - 1}
    flip(folder / "model-00001-of-00003.safetensors", random.Random(0))
    with pytest.raises(ResumeError, match=r"damaged \(exports\): .*changed since it was finished.*; export again"):
        verify(parse("verify", [str(folder)]), ONE_RANK)


@pytest.mark.slow
def test_all_damage_to_every_file_is_found(tmp_path: Path):
    output, draw, counts, missed = finished(tmp_path, (*FEW, "gptq", "gguf", "onnx")), random.Random(0), Counter(), []
    for name in files_of(output):
        for damage in (*DAMAGES, flip, flip, flip):
            if name == LOG and damage is not extend:
                continue
            found = done_to(output, name, damage, draw)
            if found != ["as it was"]:
                counts[damage.__name__] += 1
                missed += [] if found else [(name, damage.__name__)]
    for name, found in added_to(output):
        counts["add"] += 1
        missed += [] if found else [(name, "add")]
    print(dict(counts), f"{sum(counts.values())} in all, {len(files_of(output))} files")
    assert missed == [] and found_in(output) == []
