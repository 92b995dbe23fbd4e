"""Reading safetensors shards: the tensors that the library reads, and one clear line for each kind of damage."""

import json
import math
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from shardq.errors import CheckpointError, StorageError
from shardq.formats import shards

STORED = {
    "f64": torch.randn(3, 5, dtype=torch.float64),
    "f32": torch.randn(7, 2),
    "f16": torch.randn(4, 4).half(),
    "bf16": torch.randn(2, 3, 4).bfloat16(),
    "i64": torch.tensor([-(2**60), 2**60]),
    "i32": torch.tensor([[-(2**30)], [2**30]], dtype=torch.int32),
    "i16": torch.arange(-3, 3, dtype=torch.int16),
    "i8": torch.tensor([-128, 127], dtype=torch.int8),
    "u8": torch.tensor([0, 255, 7], dtype=torch.uint8),
    "bool": torch.tensor([True, False, True]),
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 4),
}


def message_of(error_class: type[Exception], call, *arguments) -> str:
    with pytest.raises(error_class) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def save_checkpoint(folder: Path, files: dict[str, dict[str, torch.Tensor]]) -> None:
    """Shards with an index, as transformers writes them."""
    for file, tensors in files.items():
        save_file(tensors, folder / file, {"format": "pt"})
    weight_map = {name: file for file, tensors in files.items() for name in tensors}
    write_index(folder, {"metadata": {}, "weight_map": weight_map})


def write_index(folder: Path, index: object) -> None:
    (folder / shards.INDEX_FILE).write_text(json.dumps(index))


def assert_reads_as_the_library(index: shards.Index, files: list[Path]) -> None:
    expected = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert set(index) == set(expected)
    for name, info in index.items():
        tensor = shards.read_tensor(info)
        assert (info.name, info.shape) == (name, tuple(expected[name].shape))
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name]), name


def test_single_file_reads_as_the_library_does(tmp_path):
    save_file(STORED, tmp_path / "model.safetensors", {"format": "pt"})
    assert_reads_as_the_library(shards.open_index(tmp_path), [tmp_path / "model.safetensors"])


def test_sharded_checkpoint_reads_as_the_library_does(tmp_path):
    save_checkpoint(tmp_path, {"b.safetensors": {"x": torch.randn(4), "y": torch.randn(2, 2).half()},
                               "a.safetensors": {"z": torch.arange(3)}})  # fmt: skip
    index = shards.open_index(tmp_path)
    assert_reads_as_the_library(index, [tmp_path / "a.safetensors", tmp_path / "b.safetensors"])
    assert {name: info.file.name for name, info in index.items()} == {
        "x": "b.safetensors", "y": "b.safetensors", "z": "a.safetensors",
    }  # fmt: skip


def test_index_goes_before_a_single_file(tmp_path):
    """A folder may keep an older consolidated file beside its shards."""
    save_file({"old": torch.zeros(1)}, tmp_path / "model.safetensors")
    save_checkpoint(tmp_path, {"a.safetensors": {"new": torch.ones(1)}})
    assert list(shards.open_index(tmp_path)) == ["new"]


def test_tensors_that_the_index_does_not_name_are_left_out(tmp_path):
    save_checkpoint(tmp_path, {"a.safetensors": {"x": torch.zeros(1), "unnamed": torch.zeros(1)}})
    write_index(tmp_path, {"weight_map": {"x": "a.safetensors"}})
    assert list(shards.open_index(tmp_path)) == ["x"]


def test_what_is_not_read_is_named(tmp_path):
    weights = {"a": torch.ones(2), "b": torch.ones(2)}
    save_checkpoint(tmp_path, {"one.safetensors": weights, "two.safetensors": {"c": torch.ones(1)}})
    assert list(shards.unread(tmp_path)) == []
    save_file(weights, tmp_path / "consolidated.safetensors")
    write_index(tmp_path, {"weight_map": {"a": "one.safetensors"}})
    assert list(shards.unread(tmp_path)) == [
        "consolidated.safetensors (model.safetensors.index.json does not name it)",
        "two.safetensors (model.safetensors.index.json does not name it)",
        "b of one.safetensors (model.safetensors.index.json does not place them there)",
    ]
    (tmp_path / "model.safetensors.index.json").unlink()
    (tmp_path / "one.safetensors").rename(tmp_path / "model.safetensors")
    (tmp_path / "two.safetensors").unlink()
    assert list(shards.unread(tmp_path)) == ["consolidated.safetensors (only model.safetensors is)"]


def test_header_says_where_the_bytes_of_a_tensor_lie(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file(STORED, path)
    raw = path.read_bytes()
    for name, info in shards.read_header(path).items():
        expected = STORED[name].flatten().view(torch.uint8).numpy().tobytes() if STORED[name].numel() else b""
        assert raw[info.offset : info.offset + info.num_bytes] == expected
        assert math.prod(info.shape) == STORED[name].numel()


@pytest.mark.parametrize("padding", range(9))
def test_header_may_have_any_length(tmp_path, padding: int):
    """The library pads headers to 8 bytes; the format does not ask for it."""
    header = b'{"x":{"dtype":"I16","shape":[2],"data_offsets":[0,4]}}' + b" " * padding
    raw = len(header).to_bytes(8, "little") + header + b"\x01\x00\xfe\xff"
    (tmp_path / "model.safetensors").write_bytes(raw)
    assert_reads_as_the_library(shards.open_index(tmp_path), [tmp_path / "model.safetensors"])


def test_metadata_is_the_headers_text(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "with.safetensors", {"format": "pt", "kind": "test"})
    save_file({"x": torch.zeros(1)}, tmp_path / "without.safetensors")
    assert shards.read_metadata(tmp_path / "with.safetensors") == {"format": "pt", "kind": "test"}
    assert shards.read_metadata(tmp_path / "without.safetensors") == {}


@pytest.mark.parametrize(("num_bytes", "start", "stop"), [(10, 35, 45), (11, 34, 45), (1000, 0, 80)])
def test_sample_is_the_middle_of_a_tensors_bytes(tmp_path, monkeypatch, num_bytes: int, start: int, stop: int):
    monkeypatch.setattr(shards, "SAMPLE_BYTES", num_bytes)
    values = torch.arange(10)
    save_file({"before": torch.ones(9), "x": values, "z": torch.ones(9)}, tmp_path / "a.safetensors")
    info = shards.read_header(tmp_path / "a.safetensors")["x"]
    assert shards.read_sample(info) == values.numpy().tobytes()[start:stop]


FOREIGN_FOLDERS = {
    "pytorch": (["config.json", "pytorch_model.bin"], "weights as pytorch_model.bin alone"),
    "shards of pytorch": (["pytorch_model-00002-of-00002.bin", "pytorch_model-00001-of-00002.bin"], "model-00001-of"),
    "adapter": (["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"], "is a LoRA adapter"),
    "mistral": (["params.json", "consolidated.safetensors", "tekken.json"], "Mistral's own format (consolidated.safet"),
    "llama": (["params.json", "consolidated.00.pth"], "own format (consolidated.00.pth)"),
    "shard": (["config.json", "model-00001-of-00002.safetensors"], "model-00001-of-00002.safetensors, but no"),
    "other name": (["config.json", "weights.safetensors"], "rename it to model.safetensors"),
    "unfinished": (
        ["manifest.json", "ledger.jsonl", "model-00001-of-00004.safetensors"],
        "is a run of shardq that is not finished",
    ),
    "gguf": (["model-q4_0.gguf"], "llama.cpp (model-q4_0.gguf)"),
    "empty": ([], "holds neither model.safetensors.index.json nor model.safetensors; pass the folder"),
}


@pytest.mark.parametrize("files, named", FOREIGN_FOLDERS.values(), ids=FOREIGN_FOLDERS)
def test_folder_without_a_checkpoint_is_told_as_what_it_is(tmp_path, files, named):
    for name in files:
        (tmp_path / name).touch()
    message = message_of(CheckpointError, shards.open_index, tmp_path)
    assert message.startswith(f"{tmp_path}: ") and named in message


def test_missing_shard_is_named(tmp_path):
    save_checkpoint(tmp_path, {"a.safetensors": {"x": torch.zeros(1)}, "b.safetensors": {"y": torch.zeros(1)}})
    (tmp_path / "b.safetensors").unlink()
    message = message_of(CheckpointError, shards.open_index, tmp_path)
    assert str(tmp_path / "b.safetensors") in message and "missing" in message


def test_tensor_that_its_shard_lacks_is_named(tmp_path):
    save_checkpoint(tmp_path, {"a.safetensors": {"x": torch.zeros(1)}})
    write_index(tmp_path, {"weight_map": {"x": "a.safetensors", "lost.weight": "a.safetensors"}})
    message = message_of(CheckpointError, shards.open_index, tmp_path)
    assert "lost.weight" in message and str(tmp_path / "a.safetensors") in message


@pytest.mark.parametrize("kept", [0, 7, 40, -1], ids=lambda kept: f"kept{kept}")
def test_truncated_shard_is_named_before_any_weight_is_read(tmp_path, kept: int):
    path = tmp_path / "model.safetensors"
    save_file({"x": torch.randn(100)}, path)
    os.truncate(path, kept if kept >= 0 else path.stat().st_size + kept)
    message = message_of(CheckpointError, shards.open_index, tmp_path)
    assert str(path) in message and "truncated" in message


def test_file_that_is_no_safetensors_is_named(tmp_path):
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    message = message_of(CheckpointError, shards.open_index, tmp_path)
    assert str(tmp_path / "model.safetensors") in message and "not a safetensors file" in message


BROKEN_INDICES = {
    "no JSON": b"garbage",
    "cut off": b'{"weight_map": {"x": ',
    "no UTF-8": b"\xff\xfe",
    "a list": b"[]",
    "no weight_map": b"{}",
    "weight_map is a list": b'{"weight_map": []}',
    "weight_map is null": b'{"weight_map": null}',
    "shard is a number": b'{"weight_map": {"x": 1}}',
}


@pytest.mark.parametrize("content", BROKEN_INDICES.values(), ids=BROKEN_INDICES)
def test_broken_index_is_named(tmp_path, content: bytes):
    (tmp_path / shards.INDEX_FILE).write_bytes(content)
    message = message_of(CheckpointError, shards.open_index, tmp_path)
    assert str(tmp_path / shards.INDEX_FILE) in message and "not a valid index" in message


@pytest.mark.parametrize("kind", ["above", "absolute", "deep"])
def test_shard_outside_the_folder_is_refused(tmp_path, kind: str):
    """A downloaded index must not make us read files elsewhere."""
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    name = {"above": "../x.safetensors", "absolute": str(tmp_path / "x.safetensors"), "deep": "a/../../x.safetensors"}
    write_index(folder, {"weight_map": {"x": name[kind]}})
    message = message_of(CheckpointError, shards.open_index, folder)
    assert str(folder / shards.INDEX_FILE) in message and name[kind] in message


def test_unsupported_dtype_names_tensor_and_dtype(tmp_path):
    save_file({"gate.weight": torch.zeros(2, dtype=torch.complex64)}, tmp_path / "a.safetensors")
    info = shards.read_header(tmp_path / "a.safetensors")["gate.weight"]
    message = message_of(CheckpointError, shards.read_tensor, info)
    assert "gate.weight" in message and "C64" in message and str(info.file) in message


def test_shard_that_shrinks_after_its_header_was_read_names_the_tensor(tmp_path):
    save_file({"x": torch.randn(100)}, tmp_path / "a.safetensors")
    info = shards.read_header(tmp_path / "a.safetensors")["x"]
    os.truncate(info.file, info.offset + 10)
    message = message_of(CheckpointError, shards.read_tensor, info)
    assert "truncated inside tensor x" in message and str(info.file) in message


@pytest.mark.parametrize("read", [shards.read_tensor, shards.read_sample])
def test_shard_that_goes_after_its_header_was_read_is_named(tmp_path, read):
    save_file({"x": torch.randn(100)}, tmp_path / "a.safetensors")
    info = shards.read_header(tmp_path / "a.safetensors")["x"]
    info.file.unlink()
    assert message_of(StorageError, read, info).startswith(f"{info.file}: no such file")


@pytest.mark.parametrize("name", STORED)
def test_pieces_are_the_whole_in_order(tmp_path, monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.setattr(shards, "PIECE_BYTES", 24)
    save_file(STORED, tmp_path / "a.safetensors")
    pieces = list(shards.read_pieces(shards.read_header(tmp_path / "a.safetensors")[name]))
    assert len(pieces) == -(-STORED[name].nbytes // 24)
    assert torch.equal(torch.cat([STORED[name].new_empty(0), *pieces]), STORED[name].flatten())


def rows_file(folder: Path, weight: torch.Tensor) -> shards.TensorInfo:
    """A weight in a file, other tensors before and behind it."""
    tensors = {"a": torch.ones(3), "weight": weight, "z": torch.full((50,), 7.0)}
    save_file(tensors, folder / "rows.safetensors")
    return shards.read_header(folder / "rows.safetensors")["weight"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "rows", [[], [0], [9], [3, 4, 5], [0, 2, 4, 9], [0, 1, 5, 6, 7, 9], list(range(10))], ids=lambda rows: str(rows)
)
def test_rows_are_those_of_the_whole_tensor(tmp_path, rows: list[int], dtype: torch.dtype):
    weight = torch.randn(10, 4).to(dtype)
    read = shards.read_rows(rows_file(tmp_path, weight), rows)
    assert read.dtype == dtype and torch.equal(read, weight[rows])


@pytest.mark.parametrize("shape", [(10,), (10, 2, 3)], ids=str)
def test_rows_may_have_any_number_of_dimensions(tmp_path, shape: tuple[int, ...]):
    weight = torch.randn(shape)
    assert torch.equal(shards.read_rows(rows_file(tmp_path, weight), [1, 2, 8]), weight[[1, 2, 8]])


def test_rows_of_a_shard_that_shrank_name_the_tensor(tmp_path):
    info = rows_file(tmp_path, torch.randn(10, 4))
    os.truncate(info.file, info.offset + 5 * 16 + 3)
    assert shards.read_rows(info, [0, 4]).shape == (2, 4)
    message = message_of(CheckpointError, shards.read_rows, info, [0, 5])
    assert "truncated inside tensor weight" in message and str(info.file) in message
