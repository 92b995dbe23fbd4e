"""A finished run is whole, and every kind of damage is found by the check that is there for it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import forked
from runs import ONE_RANK, last_json, run_quantize
from shardq.cli import parse
from shardq.commands.verify import CHECKS, find_faults, verify
from shardq.errors import CheckpointError, ResumeError
from shardq.files import xxh128_of
from shardq.formats.block_file import read_block, write_block
from shardq.formats.sealed import sealed
from shardq.formats.shards import open_index
from shardq.quant.integer_grid import IntegerGrid
from shardq.quant.quantized import QuantizedLinear
from shardq.rundir import ledger

CODES = "blocks/block-00001.safetensors"
WEIGHTS = "model-00002-of-00004.safetensors"
REST = "model-00004-of-00004.safetensors"
INDEX = "model.safetensors.index.json"
NAME = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module", params=["symmetric", "asymmetric", "full range", "two-level"])
def finished(request, llama, token_file, tmp_path_factory) -> Path:
    """A finished run of each kind of grid. Read only."""
    output = tmp_path_factory.mktemp("finished") / "out"
    more = {
        "symmetric": ["--quant.bits", 3],
        "asymmetric": ["--quant.symmetric", "false", "--quant.group_size", 32, "--export.dtype", "source"],
        "full range": ["--quant.bits", 2, "--quant.ignore", "*.q_proj"],
        "two-level": ["--quant.group_size", 16, "--quant.decompressed_bits", 8],
    }
    run_quantize(llama, token_file, output, "--quant.method", "rtn", *more[request.param])
    return output


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy to damage."""
    return shutil.copytree(finished, tmp_path / "run")


def test_finished_run_is_whole(finished, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    summary = verify(parse("verify", [str(finished)]), ONE_RANK)
    assert summary["blocks"] == 3 and summary["linears"] in (21, 18)
    shown = capsys.readouterr().out
    assert all(check in shown for check in CHECKS) and shown.count(" ok ") == len(CHECKS)
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*")}


def edit_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Rewrite a safetensors file, its metadata kept."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata)


def edit_described(path: Path, change: Callable[[dict], object]) -> None:
    """Rewrite what a block file says of its linears."""
    with safe_open(path, framework="pt") as file:
        content = json.loads(file.metadata()["shardq"])
    change(content["linears"])
    save_file(load_file(path), path, {"shardq": json.dumps(content)})


def set_value(name: str, value: float, add: bool = False) -> Callable[[dict[str, torch.Tensor]], object]:
    """Change a tensor's last value."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        flat = tensors[name].flatten()
        flat[-1] = flat[-1] + value if add else value

    return change


def edit_json(path: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def edit_text(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def exchange(tensors: dict[str, torch.Tensor]) -> None:
    """Two weights of one shape change places."""
    first, second = f"{NAME}.weight", f"{NAME.replace('up', 'gate')}.weight"
    tensors[first], tensors[second] = tensors[second], tensors[first]


DAMAGES = {  # what is done, the check that finds it, what it says
    "a flipped bit": (lambda r: flip_last_bit(r / CODES), "ledger", f"{CODES}: changed since it was finished"),
    "a missing shard": (lambda r: (r / WEIGHTS).unlink(), "index", f"{WEIGHTS}: missing"),
    "a truncated shard": (lambda r: (r / WEIGHTS).write_bytes((r / WEIGHTS).read_bytes()[:-9]), "index", "truncated"),
    "no index": (lambda r: (r / INDEX).unlink(), "index", "has lost its model.safetensors.index.json"),
    "a tensor not in the index": (
        lambda r: edit_tensors(r / WEIGHTS, lambda t: t.update(stray=torch.zeros(1))),
        "index", f"stray is in {WEIGHTS}, the index says nothing",
    ),
    "a tensor in two shards": (
        lambda r: edit_tensors(r / REST, lambda t: t.update({f"{NAME}.weight": torch.zeros(1)})),
        "index", f"{NAME}.weight is in model-00004",
    ),
    "a wrong size in the index": (
        lambda r: edit_json(r / INDEX, lambda i: i["metadata"].update(total_size=1)), "index", "metadata is"
    ),
    "a linear that is not there": (
        lambda r: edit_described(r / CODES, lambda d: d.pop(NAME)), "linears", f"{NAME} is missing"
    ),
    "a linear twice": (
        lambda r: shutil.copy(r / "blocks/block-00000.safetensors", r / CODES),
        "linears", "model.layers.0.mlp.up_proj does not belong there",
    ),
    "no codes": (lambda r: edit_tensors(r / CODES, lambda t: t.pop(f"{NAME}.codes")), "codes", "codes is missing"),
    "cut codes": (
        lambda r: edit_tensors(r / CODES, lambda t: t.update({f"{NAME}.codes": t[f"{NAME}.codes"][:-1].contiguous()})),
        "codes", "codes has shape [127",
    ),
    "no block file": (lambda r: (r / CODES).unlink(), "codes", f"{CODES}: missing"),
    "garbage": (lambda r: (r / CODES).write_bytes(b"garbage"), "codes", "not a safetensors file"),
    "an infinite scale": (
        lambda r: edit_tensors(r / CODES, set_value(f"{NAME}.scale", torch.inf)), "scales", f"{NAME} has a scale"
    ),
    "a scale of NaN": (
        lambda r: edit_tensors(r / CODES, set_value(f"{NAME}.scale", torch.nan)), "scales", f"{NAME} has a scale"
    ),
    "a scale of 0": (
        lambda r: edit_tensors(r / CODES, set_value(f"{NAME}.scale", 0)), "scales", f"{NAME} has a scale"
    ),
    "a weight off its grid": (
        lambda r: edit_tensors(r / WEIGHTS, set_value(f"{NAME}.weight", 1e-3, add=True)),
        "weights", f"{NAME}.weight is off its grid at [127, 63]",
    ),
    "exchanged weights": (lambda r: edit_tensors(r / WEIGHTS, exchange), "weights", f"{NAME}.weight is off its grid"),
    "another encoding in a block": (
        lambda r: edit_text(r / "encodings/block-00001.json", '"offset": [-', '"offset": [-1'),
        "encodings", "block-00001.json: ",
    ),
    "another encoding in the model": (
        lambda r: edit_text(r / "model_torch.encodings", '"offset": -', '"offset": -1'),
        "encodings", "model_torch.encodings: ",
    ),
    "encodings of another block": (
        lambda r: shutil.copy(r / "encodings/block-00000.json", r / "encodings/block-00001.json"),
        "encodings", "block-00001.json: ",
    ),
    "encodings cut off": (
        lambda r: (r / "model.encodings").write_text("\n".join((r / "model.encodings").read_text().split("\n")[:-2])),
        "encodings", "model.encodings: cut off",
    ),
    "encodings of too many": (
        lambda r: edit_text(r / "model.encodings", "\n]}", ',\n{"name": "more"}\n]}'),
        "encodings", "holds more than the quantized linears",
    ),
}  # fmt: skip


def flip_last_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def renew_digests(run: Path) -> None:
    """Make the ledger say what is there, so that damage has to be found by looking at the content."""
    entries = ledger.read_lines(run)
    for entry in entries:
        files = {name: run / name for name in entry["files"]}
        entry["files"] = {name: xxh128_of(path) if path.exists() else "-" for name, path in files.items()}
        entry["bytes"] = {name: path.stat().st_size for name, path in files.items() if path.exists()}
    (run / "ledger.jsonl").write_text("".join(json.dumps(sealed(entry)) + "\n" for entry in entries))


@pytest.mark.parametrize("damage, check, report", DAMAGES.values(), ids=DAMAGES)
def test_damage_is_found_by_its_check(run, damage, check, report):
    damage(run)
    if check != "ledger":
        renew_digests(run)
    faults, _, _ = find_faults(run)
    assert any(report in fault for fault in faults[check]), faults
    assert all("\n" not in fault for found in faults.values() for fault in found)


def test_parameters_that_are_not_finite_are_found(run):
    """Whatever the ledger says: such a run may be of before its ends were looked at."""
    for shard, name in ((REST, "model.norm.weight"), (WEIGHTS, "model.layers.1.input_layernorm.weight")):
        edit_tensors(run / shard, set_value(name, torch.inf))
    renew_digests(run)
    faults, _, _ = find_faults(run)
    assert [fault.partition(": ")[2] for fault in faults["finite"]] == [
        "tensor model.norm.weight holds inf at [63]", "tensor model.layers.1.input_layernorm.weight holds inf at [63]"
    ]  # fmt: skip
    assert not any(found for check, found in faults.items() if check != "finite")


def test_run_of_before_is_checked_as_far_as_it_goes(run, capsys):
    """Its ledger has neither sizes nor seals nor what was copied, its export no record."""
    entries = ledger.read_lines(run)
    named = [name for name in entries[-1]["files"] if name not in ("manifest.json", "generation_config.json")]
    entries[-1]["files"] = {name: entries[-1]["files"][name] for name in named}
    lines = [json.dumps({name: value for name, value in entry.items() if name != "bytes"}) for entry in entries]
    (run / "ledger.jsonl").write_text("".join(f"{line}\n" for line in lines))
    (run / "hf").mkdir()
    (run / "hf" / "README.md").write_text("of before")
    assert verify(parse("verify", [str(run)]), ONE_RANK)["blocks"] == 3
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.count(" ok ") == len(CHECKS) - 2 and "not known of hf" in shown
    shutil.copy(run / REST, run / "model-00005-of-00004.safetensors")
    with pytest.raises(ResumeError, match="model-00005-of-00004.safetensors: no file of this run"):
        verify(parse("verify", [str(run)]), ONE_RANK)


def test_head_that_is_not_finite_is_refused_before_work_starts(llama, token_file, tmp_path):
    model = shutil.copytree(llama, tmp_path / "model")
    name = "model.embed_tokens.weight"
    file = open_index(model)[name].file
    edit_tensors(file, set_value(name, torch.nan))
    with pytest.raises(CheckpointError, match=f"{name} holds nan"):
        run_quantize(model, token_file, tmp_path / "out", "--quant.method", "rtn")
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_zero_point_beyond_the_codes_is_found(run):
    if f"{NAME}.zero_point" not in load_file(run / CODES):
        pytest.skip("a symmetric grid has none")
    edit_tensors(run / CODES, set_value(f"{NAME}.zero_point", 8))
    faults, _, _ = find_faults(run)
    assert any(f"{NAME} has a zero point that its grid does not allow" in fault for fault in faults["codes"])


def test_scale_that_is_no_whole_multiple_is_found(run):
    linear = read_block(run / CODES)[NAME]
    if not linear.grid.decompressed_bits:
        pytest.skip("scales of other grids are no multiples")
    column = linear.scale_OG[-1].argmin()
    off = torch.nextafter(linear.scale_OG[-1, column], torch.tensor(1.0))
    edit_tensors(run / CODES, lambda tensors: tensors[f"{NAME}.scale"][-1].index_fill_(0, column, off))
    faults, _, _ = find_faults(run)
    assert any(f"{NAME} has a scale that its grid does not allow" in fault for fault in faults["scales"])


def test_bits_behind_the_last_code_are_found(tmp_path):
    """65 channels of 3 bits end within a byte."""
    codes = torch.zeros(2, 65, dtype=torch.int8)
    write_block(tmp_path / "b", {"a": QuantizedLinear(codes, torch.ones(2, 1), torch.zeros(2, 1), IntegerGrid(bits=3))})
    assert torch.equal(read_block(tmp_path / "b")["a"].codes_OI, codes)
    edit_tensors(tmp_path / "b", set_value("a.codes", 0x80, add=True))
    with pytest.raises(CheckpointError, match="bits set behind its last code"):
        read_block(tmp_path / "b")


def test_unfinished_run_is_said_to_be(run):
    lines = (run / "ledger.jsonl").read_text().splitlines(keepends=True)
    (run / "ledger.jsonl").write_text("".join(lines[:-1]) + lines[-1][:20])
    with pytest.raises(ResumeError, match="not finished, 3 block"):
        verify(parse("verify", [str(run)]), ONE_RANK)
    assert (run / "ledger.jsonl").read_text().endswith(lines[-1][:20]), "a check writes nothing"


def test_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(ResumeError, match="holds no run of shardq"):
        verify(parse("verify", [str(tmp_path)]), ONE_RANK)


def test_command_says_what_is_damaged_and_exits_with_6(llama, token_file, tmp_path):
    run_quantize(llama, token_file, tmp_path / "out", "--quant.method", "rtn")
    command = [tmp_path / "shardq.py", "verify", tmp_path / "out"]
    command[0].write_text("from shardq.cli import main; main()")
    whole = forked.ranks(1, command)
    assert whole.returncode == 0, whole.stderr
    expected = {"output": str(tmp_path / "out"), "blocks": 3, "linears": 21}
    assert {name: last_json(whole.stdout)[name] for name in expected} == expected
    flip_last_bit(tmp_path / "out" / CODES)
    damaged = forked.ranks(1, command)
    assert damaged.returncode == 6
    assert damaged.stderr.startswith("shardq: ") and damaged.stderr.count("\n") == 1
    assert f"damaged (ledger, weights): {tmp_path / 'out' / CODES}: changed" in damaged.stderr
