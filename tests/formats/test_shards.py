"""Reading safetensors shards: the tensors that the library reads, and one clear line for each kind of damage."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import xxhash
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


def test_weights_that_are_finite_are_read_as_they_are(tmp_path):
    save_file(STORED, tmp_path / "a.safetensors")
    for name, info in shards.read_header(tmp_path / "a.safetensors").items():
        assert torch.equal(shards.read_weight(info), STORED[name])


@pytest.mark.parametrize(("num_bytes", "start", "stop"), [(10, 35, 45), (11, 34, 45), (1000, 0, 80)])
def test_sample_is_the_middle_of_a_tensors_bytes(tmp_path, num_bytes: int, start: int, stop: int):
    values = torch.arange(10)
    save_file({"before": torch.ones(9), "x": values, "z": torch.ones(9)}, tmp_path / "a.safetensors")
    info = shards.read_header(tmp_path / "a.safetensors")["x"]
    assert shards.read_sample(info, num_bytes) == values.numpy().tobytes()[start:stop]


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
    save_file({"gate.weight": torch.zeros(2).to(torch.float8_e4m3fn)}, tmp_path / "a.safetensors")
    info = shards.read_header(tmp_path / "a.safetensors")["gate.weight"]
    message = message_of(CheckpointError, shards.read_tensor, info)
    assert "gate.weight" in message and "F8_E4M3" in message and str(info.file) in message


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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_weight_that_is_not_finite_names_value_and_place(tmp_path, value: str, dtype: torch.dtype):
    weight = torch.zeros(3, 4, dtype=dtype)
    weight[1, 2] = float(value)
    save_file({"q_proj.weight": weight}, tmp_path / "a.safetensors")
    info = shards.read_header(tmp_path / "a.safetensors")["q_proj.weight"]
    message = message_of(CheckpointError, shards.read_weight, info)
    assert f"q_proj.weight holds {value} at [1, 2]" in message and str(info.file) in message


@pytest.fixture
def in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> shards.TensorInfo:
    """A tensor of several pieces, the last one short, between others."""
    monkeypatch.setattr(shards, "PIECE_BYTES", 64)
    return rows_file(tmp_path, torch.randn(10, 7).half())


def test_tensor_is_known_by_all_its_bytes_and_by_nothing_else(in_pieces: shards.TensorInfo):
    content = in_pieces.file.read_bytes()[in_pieces.offset : in_pieces.offset + 140]
    digests = {"other": "d"}
    shards.check_weight(in_pieces, digests)
    assert digests == {"other": "d", "weight": xxhash.xxh3_128_hexdigest(content)}
    tensor = shards.read_weight(in_pieces)
    assert shards.check_same(in_pieces, tensor, digests, {}) is tensor
    for place in range(140):
        with open(in_pieces.file, "r+b") as file:
            file.seek(in_pieces.offset + place)
            file.write(bytes([content[place] ^ 1]))
        for check in (shards.check_weight, lambda i, d: shards.check_same(i, shards.read_tensor(i), d, {})):
            message = message_of(CheckpointError, check, in_pieces, digests)
            assert message.startswith(f"{in_pieces.file}: tensor weight is not what it was when the run began")
        with open(in_pieces.file, "r+b") as file:
            file.seek(in_pieces.offset)
            file.write(content)
    shards.check_weight(in_pieces, digests)


@pytest.mark.parametrize("name", STORED)
def test_pieces_and_the_whole_have_one_digest(tmp_path: Path, name: str):
    save_file(STORED, tmp_path / "a.safetensors")
    info, digests = shards.read_header(tmp_path / "a.safetensors")[name], {}
    shards.check_weight(info, digests)
    shards.check_same(info, shards.read_tensor(info), digests, {info.name: shards.sample_digest(info)})
    assert list(digests) == [name]


def test_sample_is_compared_with_the_same_bytes_of_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shards, "SAMPLE_BYTES", 8)
    info = rows_file(tmp_path, torch.arange(25.0))  # its middle 8 bytes begin inside number 11
    samples = {"weight": shards.sample_digest(info)}
    assert samples["weight"] == xxhash.xxh3_128_hexdigest(torch.arange(25.0).numpy().tobytes()[46:54])
    others = torch.arange(25.0)
    others[10] = 7.0
    shards.check_same(info, others, {}, samples)
    others[12] = 7.0
    message = message_of(CheckpointError, lambda: shards.check_same(info, others, {}, samples))
    assert "tensor weight is not what it was when the run began" in message


@pytest.mark.parametrize("row", [0, 4, 9])
def test_value_in_any_piece_that_is_not_finite_is_named_with_its_place(in_pieces: shards.TensorInfo, row: int):
    weight = shards.read_tensor(in_pieces)
    weight[row, 3] = -torch.inf
    rows_file(in_pieces.file.parent, weight)
    message = message_of(CheckpointError, shards.check_weight, in_pieces, {})
    assert f"rows.safetensors: tensor weight holds -inf at [{row}, 3]" in message


def checked(info: shards.TensorInfo, is_buffer: bool) -> None:
    shards.check_weight(info, {}, is_buffer)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("read", [lambda *given: shards.read_weight(given[0], False, given[1]), checked])
def test_buffer_may_be_infinite_but_hold_no_nan(tmp_path: Path, read: Callable, value: float):
    save_file({"limit": torch.tensor([[1.0, value], [-math.inf, 2.0]])}, tmp_path / "a.safetensors")
    info = shards.read_header(tmp_path / "a.safetensors")["limit"]
    assert f"limit holds {value} at [0, 1]" in message_of(CheckpointError, read, info, False)
    if math.isnan(value):
        assert "limit holds nan at [0, 1]" in message_of(CheckpointError, read, info, True)
    else:
        read(info, True)


def test_tensor_that_shrank_is_named(in_pieces: shards.TensorInfo):
    os.truncate(in_pieces.file, in_pieces.offset + 139)
    assert "truncated inside tensor weight" in message_of(CheckpointError, shards.check_weight, in_pieces, {})


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
    read = shards.read_weight_rows(rows_file(tmp_path, weight), rows)
    assert read.dtype == dtype and torch.equal(read, weight[rows])


@pytest.mark.parametrize("shape", [(10,), (10, 2, 3)], ids=str)
def test_rows_may_have_any_number_of_dimensions(tmp_path, shape: tuple[int, ...]):
    weight = torch.randn(shape)
    assert torch.equal(shards.read_weight_rows(rows_file(tmp_path, weight), [1, 2, 8]), weight[[1, 2, 8]])


def test_rows_that_are_not_asked_for_are_not_read(tmp_path):
    weight = torch.randn(10, 4)
    weight[[0, 5, 9]] = torch.nan
    read = shards.read_weight_rows(rows_file(tmp_path, weight), [1, 4, 6, 8])
    assert torch.equal(read, weight[[1, 4, 6, 8]])


def test_row_that_is_not_finite_is_named_with_its_place_in_the_whole_tensor(tmp_path):
    weight = torch.randn(10, 4)
    weight[6, 2] = torch.inf
    message = message_of(CheckpointError, shards.read_weight_rows, rows_file(tmp_path, weight), [1, 6])
    assert "rows.safetensors: tensor weight holds inf at [6, 2]" in message


def test_rows_of_a_shard_that_shrank_name_the_tensor(tmp_path):
    info = rows_file(tmp_path, torch.randn(10, 4))
    os.truncate(info.file, info.offset + 5 * 16 + 3)
    assert torch.isfinite(shards.read_weight_rows(info, [0, 4])).all()
    message = message_of(CheckpointError, shards.read_weight_rows, info, [0, 5])
    assert "truncated inside tensor weight" in message and str(info.file) in message
