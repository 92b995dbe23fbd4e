"""Our own safetensors files: whole or not at all, equal bytes for equal tensors, readable by the library."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from shardq.errors import CheckpointError, QuantizationError, StorageError
from shardq.formats.shards import read_metadata
from shardq.formats.tensor_file import (
    check_finite,
    read_checked,
    read_tensors,
    write_checked,
    write_one_by_one,
    write_tensors,
)

TENSORS = {
    "codes": torch.arange(12, dtype=torch.uint8).reshape(3, 4),
    "scale": torch.randn(3, 1),
    "weight": torch.randn(3, 4).bfloat16(),
    "offset": torch.tensor([[-8], [0], [7]], dtype=torch.int8),
}


def message_of(error_class: type[Exception], call, *arguments) -> str:
    with pytest.raises(error_class) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def assert_same_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def test_the_library_reads_what_we_write(tmp_path):
    write_tensors(tmp_path / "a.safetensors", TENSORS, {"format": "pt"})
    assert_same_tensors(load_file(tmp_path / "a.safetensors"), TENSORS)
    assert read_metadata(tmp_path / "a.safetensors") == {"format": "pt"}


DTYPES = (torch.bool, torch.uint8, torch.int8, torch.float8_e4m3fn, torch.float8_e5m2, torch.int16, torch.float16,
          torch.bfloat16, torch.int32, torch.float32, torch.float64, torch.int64)  # fmt: skip


@pytest.mark.parametrize("metadata", [None, {"shardq": '{"name": "\\u00e9 \u00e9", "n": 1}'}])
def test_one_by_one_comes_out_the_same(tmp_path, metadata: dict | None):
    tensors = TENSORS | {f"{name}.{dtype}": torch.ones(3, 2).to(dtype) for name in "ba" for dtype in DTYPES}
    tensors |= {"empty": torch.empty(0, 4), "number": torch.tensor(2.5), "turned": torch.randn(4, 3).t()}
    write_tensors(tmp_path / "whole", tensors, metadata)
    calls = []

    def make() -> Iterator[tuple[str, torch.Tensor]]:
        calls.append(len(calls))
        yield from tensors.items()

    write_one_by_one(tmp_path / "single", make, metadata)
    assert (tmp_path / "single").read_bytes() == (tmp_path / "whole").read_bytes() and calls == [0, 1]


def test_we_read_what_the_library_writes(tmp_path):
    save_file(TENSORS, tmp_path / "a.safetensors")
    assert_same_tensors(read_tensors(tmp_path / "a.safetensors"), TENSORS)


def test_tensors_read_do_not_change_with_the_file(tmp_path):
    """A memory map would show the new bytes."""
    path = tmp_path / "a.safetensors"
    save_file({"x": torch.zeros(8)}, path)
    tensors = read_tensors(path)
    path.write_bytes(b"\xff" * path.stat().st_size)
    assert torch.equal(tensors["x"], torch.zeros(8))


def test_views_are_written_as_the_elements_they_show(tmp_path):
    base = torch.arange(20.0).reshape(4, 5)
    views = {"transposed": base.T, "row": base[1], "column": base[:, 2], "grad": base.clone().requires_grad_()}
    write_tensors(tmp_path / "a.safetensors", views)
    assert_same_tensors(load_file(tmp_path / "a.safetensors"), {name: view.detach() for name, view in views.items()})


def test_a_view_does_not_take_the_space_of_what_it_is_a_view_of(tmp_path):
    write_tensors(tmp_path / "a.safetensors", {"row": torch.zeros(1000, 100)[3]})
    assert (tmp_path / "a.safetensors").stat().st_size < 1000


def test_equal_tensors_give_equal_bytes(tmp_path):
    write_tensors(tmp_path / "a.safetensors", TENSORS, {"shardq": "{}"})
    copies = {name: TENSORS[name].clone() for name in reversed(TENSORS)}
    write_tensors(tmp_path / "b.safetensors", copies, {"shardq": "{}"})
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_folder_is_made_and_nothing_is_left_beside_the_file(tmp_path):
    write_tensors(tmp_path / "deep" / "folder" / "a.safetensors", TENSORS)
    assert os.listdir(tmp_path / "deep" / "folder") == ["a.safetensors"]


@pytest.mark.parametrize("damage", ["missing", "truncated", "garbage"])
def test_file_that_cannot_be_read_is_named(tmp_path, damage: str):
    path = tmp_path / "a.safetensors"
    if damage != "missing":
        save_file(TENSORS, path)
        os.truncate(path, path.stat().st_size - 1)
    if damage == "garbage":
        path.write_bytes(b"garbage")
    assert str(path) in message_of(CheckpointError, read_tensors, path)


@pytest.fixture(name="small_disk")
def _small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 64 KiB with one file of 400 bytes of tensors."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted: {mounted.stderr.decode().strip()}")
    try:
        save_file({"x": torch.ones(100)}, folder / "a.safetensors")
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def test_full_disk_leaves_the_old_file_and_says_so(small_disk):
    path = small_disk / "a.safetensors"
    message = message_of(StorageError, write_tensors, path, {"x": torch.zeros(100_000)})
    assert message.startswith(f"{path}: ") and "No space left" in message and "make room" in message
    assert os.listdir(small_disk) == ["a.safetensors"]
    assert torch.equal(load_file(path)["x"], torch.ones(100))


def test_disk_that_has_room_again_is_written(small_disk):
    (small_disk / "filler").write_bytes(b"0" * 50_000)
    message_of(StorageError, write_tensors, small_disk / "a.safetensors", {"x": torch.zeros(5000)})
    (small_disk / "filler").unlink()
    write_tensors(small_disk / "a.safetensors", {"x": torch.zeros(5000)})
    assert torch.equal(load_file(small_disk / "a.safetensors")["x"], torch.zeros(5000))


@pytest.mark.parametrize("name", ["a.safetensors", "new.safetensors", "folder/new.safetensors"])
def test_read_only_disk_leaves_the_old_file_and_says_so(small_disk, name: str):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    message = message_of(StorageError, write_tensors, small_disk / name, {"x": torch.zeros(4)})
    assert message.startswith(f"{small_disk / name}: ") and "cannot be written" in message
    assert torch.equal(load_file(small_disk / "a.safetensors")["x"], torch.ones(100))


def test_folder_in_the_files_place_is_named(tmp_path):
    (tmp_path / "a.safetensors").mkdir()
    message = message_of(StorageError, write_tensors, tmp_path / "a.safetensors", {"x": torch.zeros(4)})
    assert str(tmp_path / "a.safetensors") in message
    assert os.listdir(tmp_path) == ["a.safetensors"]


ABOUT = {"done": 3, "linears": ["b", "a"], "loss": 0.1}


def test_checked_file_gives_back_tensors_and_what_is_said_about_them(tmp_path):
    tensors = TENSORS | {"step": torch.tensor(3.0), "empty": torch.zeros(0, 2)}
    write_checked(tmp_path / "a.safetensors", tensors, ABOUT)
    found, about = read_checked(tmp_path / "a.safetensors")
    assert_same_tensors(found, tensors)
    assert about == ABOUT
    write_checked(tmp_path / "b.safetensors", {"x": torch.zeros(2)})
    assert read_checked(tmp_path / "b.safetensors")[1] is None


def test_no_flipped_bit_of_a_checked_file_goes_unnoticed(tmp_path):
    path = tmp_path / "a.safetensors"
    write_checked(path, {"codes": TENSORS["codes"], "scale": TENSORS["scale"]}, ABOUT)
    whole = path.read_bytes()
    padding = whole.index(b"}  ") if b"}  " in whole else len(whole)  # blanks behind the header mean nothing
    for number in range(8 * len(whole)):
        content = bytearray(whole)
        content[number // 8] ^= 1 << number % 8
        path.write_bytes(content)
        try:
            found, about = read_checked(path)
        except CheckpointError:
            continue
        assert number // 8 > padding and about == ABOUT
        assert torch.equal(found["codes"], TENSORS["codes"]) and torch.equal(found["scale"], TENSORS["scale"])


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_values_that_are_not_finite_are_named(tmp_path: Path, value: float):
    tensors = {"codes": torch.ones(2, dtype=torch.uint8), "scale": torch.tensor([1.0, value]).half()}
    with pytest.raises(QuantizationError, match="scale has a value that is not finite in float16"):
        check_finite(tmp_path / "a", tensors)
    check_finite(tmp_path / "a", tensors | {"scale": torch.ones(2).half(), "empty": torch.ones(0)})
