"""Activations between blocks: memory and disk keep the same, and the disk's files are plain safetensors."""

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from shardq.cache.store import ActivationStore, DiskStore, MemoryStore
from shardq.errors import StorageError


@pytest.fixture(params=["memory", "disk"], name="store")
def _store(request, tmp_path) -> ActivationStore:
    return MemoryStore() if request.param == "memory" else DiskStore(tmp_path / "cache")


def files_of(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


def fill(store: ActivationStore, generation: int, samples: range) -> dict[tuple[str, int], torch.Tensor]:
    """Different values in both streams; gives what was written."""
    written = {(stream, sample): torch.randn(3, 4) for stream in ("fp", "quant") for sample in samples}
    for (stream, sample), hidden in written.items():
        store.write(stream, generation, sample, hidden)
    return written


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_was_written_is_read(store, dtype: torch.dtype):
    hidden = torch.randn(5, 7).to(dtype)
    store.write("fp", 3, 11, hidden)
    found = store.read("fp", 3, 11)
    assert found.dtype == dtype and found.device.type == "cpu"
    assert torch.equal(found, hidden)


def test_streams_generations_and_samples_are_kept_apart(store):
    written = {
        (stream, generation, sample): torch.randn(2, 3)
        for stream in ("fp", "quant")
        for generation in (1, 2, 12)
        for sample in (0, 1, 1_000_001)
    }
    for (stream, generation, sample), hidden in written.items():
        store.write(stream, generation, sample, hidden)
    for (stream, generation, sample), hidden in written.items():
        assert torch.equal(store.read(stream, generation, sample), hidden)


def test_second_write_replaces_the_first(store):
    store.write("quant", 1, 0, torch.zeros(4, 4))
    store.write("quant", 1, 0, torch.ones(2, 4))
    assert torch.equal(store.read("quant", 1, 0), torch.ones(2, 4))


@pytest.mark.parametrize("stream", ["fp", "quant"])
def test_both_streams_start_from_the_same_generation_0(store, stream: str):
    hidden = torch.randn(2, 3)
    store.write(stream, 0, 5, hidden)
    assert torch.equal(store.read("fp", 0, 5), hidden)
    assert torch.equal(store.read("quant", 0, 5), hidden)
    assert store.holds(0, 5)


def test_generation_0_is_on_the_disk_once(tmp_path):
    store = DiskStore(tmp_path)
    store.write("fp", 0, 0, torch.zeros(2, 3))
    store.write("quant", 0, 0, torch.zeros(2, 3))
    assert len(files_of(tmp_path)) == 1


def test_later_generations_need_both_streams(store):
    assert not store.holds(1, 0)
    store.write("fp", 1, 0, torch.zeros(2, 3))
    assert not store.holds(1, 0)
    store.write("quant", 1, 0, torch.zeros(2, 3))
    assert store.holds(1, 0)
    assert not store.holds(1, 1) and not store.holds(2, 0)


@pytest.mark.parametrize("generation", [0, 1])
def test_dropped_samples_are_gone_and_the_others_stay(store, generation: int):
    """Ranks share the disk's folder: each drops only the samples that it owns."""
    written = fill(store, generation, range(6))
    for sample in range(0, 6, 2):
        store.drop(generation, sample)
    assert [store.holds(generation, sample) for sample in range(6)] == [False, True] * 3
    assert torch.equal(store.read("quant", generation, 5), written["quant", 5])


def test_other_generations_survive_a_drop(store):
    fill(store, 1, range(2))
    kept = fill(store, 2, range(2))
    for sample in range(2):
        store.drop(1, sample)
    assert store.holds(2, 0) and store.holds(2, 1)
    assert torch.equal(store.read("fp", 2, 1), kept["fp", 1])


def test_generation_that_is_not_there_can_be_dropped(store):
    store.drop(4, 0)
    fill(store, 4, range(1))
    store.drop(4, 0)
    store.drop(4, 0)
    assert not store.holds(4, 0)


def test_one_rank_writes_while_another_drops(tmp_path):
    """On a shared cache a replay ends with a generation that another rank has only begun."""
    writes = DiskStore(tmp_path).write
    finished = threading.Event()

    def drop_until_finished():
        while not finished.is_set():
            DiskStore(tmp_path).drop(1, 1)

    with ThreadPoolExecutor() as pool:
        dropping = pool.submit(drop_until_finished)
        try:
            for _ in range(30):
                writes("fp", 1, 0, torch.zeros(2, 3))
                DiskStore(tmp_path).drop(1, 0)
        finally:
            finished.set()
        dropping.result()


def test_store_keeps_its_own_copy(store):
    hidden = torch.ones(2, 3)
    store.write("fp", 1, 0, hidden)
    hidden.zero_()
    assert torch.equal(store.read("fp", 1, 0), torch.ones(2, 3))


def test_sample_of_a_batch_does_not_keep_the_batch(tmp_path):
    batch = torch.randn(1000, 2, 3)
    memory, disk = MemoryStore(), DiskStore(tmp_path)
    for store in (memory, disk):
        store.write("fp", 1, 0, batch[7])
        assert torch.equal(store.read("fp", 1, 0), batch[7])
    assert memory.read("fp", 1, 0).untyped_storage().nbytes() == 2 * 3 * 4
    [file] = files_of(tmp_path)
    assert (tmp_path / file).stat().st_size < 1000


def test_stored_values_carry_no_graph(store):
    store.write("fp", 1, 0, torch.ones(2, 3, requires_grad=True) * 2)
    assert not store.read("fp", 1, 0).requires_grad


def test_disk_is_found_again_by_a_new_store(tmp_path):
    written = fill(DiskStore(tmp_path), 2, range(2))
    store = DiskStore(tmp_path)
    assert store.holds(2, 0) and store.holds(2, 1)
    assert torch.equal(store.read("quant", 2, 1), written["quant", 1])


def test_every_file_is_safetensors(tmp_path):
    """No pickle: a cache folder from elsewhere must not be able to run code."""
    store = DiskStore(tmp_path)
    written = fill(store, 1, range(2))
    found = [load_file(tmp_path / file) for file in files_of(tmp_path)]
    assert len(found) == 4
    for hidden in written.values():
        assert any(torch.equal(next(iter(tensors.values())), hidden) for tensors in found)


DAMAGES = {
    "missing": lambda path: path.unlink(),
    "truncated": lambda path: os.truncate(path, path.stat().st_size - 4),
    "garbage": lambda path: path.write_bytes(b"garbage"),
    "a flipped bit": lambda path: path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 64])),
    "exchanged values": lambda path: path.write_bytes(path.read_bytes()[:-8] + path.read_bytes()[:-9:-1]),
    "written by another program": lambda path: save_file(load_file(path), path),
}


@pytest.mark.parametrize("stream", ["fp", "quant"])
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_file_is_named_and_no_longer_there(tmp_path, damage: Callable, stream: str):
    store = DiskStore(tmp_path)
    fill(store, 1, range(2))
    path = tmp_path / "generation-00001" / f"{stream}-000000.safetensors"
    damage(path)
    with pytest.raises(StorageError) as caught:
        store.read(stream, 1, 0)
    message = str(caught.value)
    assert message.startswith(f"{path}: cached activations are gone or damaged; run the same") and "\n" not in message
    assert not path.exists() and not store.holds(1, 0) and store.holds(1, 1)


def test_damaged_file_is_not_held(tmp_path):
    store = DiskStore(tmp_path)
    fill(store, 1, range(2))
    DAMAGES["a flipped bit"](tmp_path / "generation-00001" / "quant-000001.safetensors")
    assert store.holds(1, 0) and not store.holds(1, 1)


def test_write_into_a_files_place_is_one_line(tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(StorageError) as caught:
        DiskStore(tmp_path / "cache").write("fp", 1, 0, torch.zeros(2, 3))
    assert str(caught.value).startswith(f"{tmp_path / 'cache'}/") and "\n" not in str(caught.value)
