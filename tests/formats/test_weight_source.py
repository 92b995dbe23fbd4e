"""Reading a checkpoint's tensors: finite values, and the same bytes each time."""

import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import xxhash
from safetensors.torch import save_file
from torch import Tensor

from shardq.errors import CheckpointError
from shardq.formats import shards
from shardq.formats.shards import TensorInfo
from shardq.formats.source import SourceTensor, WeightSource, open_source


def message_of(call: Callable, *arguments: object) -> str:
    with pytest.raises(CheckpointError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def source_of(folder: Path, weight: Tensor) -> tuple[WeightSource, SourceTensor]:
    """A weight in a file, other tensors before and behind it."""
    save_file({"a": torch.ones(3), "weight": weight, "z": torch.full((50,), 7.0)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    source = open_source(folder)
    return source, source.tensors["weight"]


def flip(info: TensorInfo, place: int) -> None:
    """Change one bit of a stored tensor, or change it back."""
    with open(info.file, "r+b") as file:
        file.seek(info.offset + place)
        byte = file.read(1)[0]
        file.seek(info.offset + place)
        file.write(bytes([byte ^ 1]))


@pytest.fixture
def in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[WeightSource, SourceTensor]:
    """A tensor of several pieces, the last one short, between others."""
    monkeypatch.setattr(shards, "PIECE_BYTES", 64)
    return source_of(tmp_path, torch.randn(10, 7).half())


READS = [WeightSource.read, WeightSource.check]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("read", READS)
def test_weight_that_is_not_finite_names_value_and_place(tmp_path, read: Callable, value: str, dtype: torch.dtype):
    weight = torch.zeros(3, 4, dtype=dtype)
    weight[1, 2] = float(value)
    message = message_of(read, *source_of(tmp_path, weight))
    assert f"model.safetensors: tensor weight holds {value} at [1, 2]" in message


def test_tensor_is_known_by_all_its_bytes_and_by_nothing_else(in_pieces: tuple[WeightSource, SourceTensor]):
    source, tensor = in_pieces
    [info] = tensor.stored
    content = info.file.read_bytes()[info.offset : info.offset + 140]
    source.digests["other"] = "d"
    source.check(tensor)
    assert source.digests == {"other": "d", "weight": xxhash.xxh3_128_hexdigest(content)}
    source.read(tensor)
    for place in range(140):
        flip(info, place)
        for read, what in ((source.check, tensor), (source.read, tensor), (source.read_plain, tensor)):
            message = message_of(read, what)
            assert message.startswith(f"{info.file}: tensor weight is not what it was when the run began")
        flip(info, place)
    source.check(tensor)


@pytest.mark.parametrize("values", [torch.randn(7, 2), torch.tensor([True, False]), torch.zeros(0, 4), torch.tensor(3)])
def test_pieces_and_the_whole_have_one_digest(tmp_path: Path, values: Tensor):
    source, tensor = source_of(tmp_path, values)
    source.note_samples(source.index.values())
    source.check(tensor)
    assert torch.equal(source.read(tensor), values)
    assert source.digests.keys() == {"weight"} and source.samples.keys() == {"a", "weight", "z"}


def test_sample_is_compared_with_the_same_bytes_of_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shards, "SAMPLE_BYTES", 8)
    source, tensor = source_of(tmp_path, torch.arange(25.0))  # its middle 8 bytes begin inside number 11
    source.note_samples(source.index.values())
    assert source.samples["weight"] == xxhash.xxh3_128_hexdigest(torch.arange(25.0).numpy().tobytes()[46:54])
    flip(tensor.stored[0], 45)
    source.read(tensor)
    source.digests.clear()
    flip(tensor.stored[0], 46)
    assert "tensor weight is not what it was when the run began" in message_of(source.read, tensor)


@pytest.mark.parametrize("row", [0, 4, 9])
def test_value_in_any_piece_that_is_not_finite_is_named_with_its_place(
    in_pieces: tuple[WeightSource, SourceTensor], row: int
):
    source, tensor = in_pieces
    weight = source.read_unchecked(tensor)
    weight[row, 3] = -torch.inf
    message = message_of(WeightSource.check, *source_of(source.folder, weight))
    assert f"tensor weight holds -inf at [{row}, 3]" in message


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("read", READS)
def test_buffer_may_be_infinite_but_hold_no_nan(tmp_path: Path, read: Callable, value: float):
    source, tensor = source_of(tmp_path, torch.tensor([[1.0, value], [-math.inf, 2.0]]))
    assert f"weight holds {value} at [0, 1]" in message_of(read, source, tensor, False)
    if math.isnan(value):
        assert "weight holds nan at [0, 1]" in message_of(read, source, tensor, True)
    else:
        read(source, tensor, True)


def test_tensor_that_shrank_is_named(in_pieces: tuple[WeightSource, SourceTensor]):
    source, tensor = in_pieces
    os.truncate(tensor.file, tensor.stored[0].offset + 139)
    assert "truncated inside tensor weight" in message_of(source.check, tensor)


def test_rows_that_are_not_asked_for_are_not_read(tmp_path):
    weight = torch.randn(10, 4)
    weight[[0, 5, 9]] = torch.nan
    source, tensor = source_of(tmp_path, weight)
    assert torch.equal(source.read_rows(tensor, [1, 4, 6, 8]), weight[[1, 4, 6, 8]])


def test_row_that_is_not_finite_is_named_with_its_place_in_the_whole_tensor(tmp_path):
    weight = torch.randn(10, 4)
    weight[6, 2] = torch.inf
    source, tensor = source_of(tmp_path, weight)
    message = message_of(source.read_rows, tensor, [1, 6])
    assert "model.safetensors: tensor weight holds inf at [6, 2]" in message
