"""Whenever a run is killed, or the power is cut, the same command goes on and ends with the same bytes."""

import os
from collections import Counter
from pathlib import Path

import pytest

import crashes
import forked
from disk_model import Disk
from shardq import files
from shardq.files import append_line, write_text
from shardq.rundir import ledger


def crash(*arguments: object) -> list[dict]:
    """What `crashes.py` tells, a dictionary for each crash."""
    return forked.told_by(crashes.__file__, *arguments)


def assert_survived(told: list[dict]) -> None:
    assert [crash for crash in told if crash["wrong"]] == []


@pytest.mark.parametrize(
    "what, moments",
    [
        ("points", 1),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("points", 3), ("redo", 1), ("redo", 3))),
    ],
)
def test_run_killed_at_any_point_of_the_protocol_goes_on(tmp_path, what, moments):
    told = crash(what, tmp_path, moments)
    assert_survived(told)
    assert {crash["point"] for crash in told} == set(crashes.POINTS)
    assert len(told) == (len(crashes.POINTS) if moments == 1 else 2 * len(crashes.POINTS) + len(crashes.TORN))


@pytest.mark.slow
def test_two_hundred_kills_at_random(tmp_path):
    told = crash("random", tmp_path, 200)
    print(Counter((crash["point"], crash["ranks"], crash["redo"], crash["killed"]) for crash in told))
    assert_survived(told)
    assert sum(crash["killed"] for crash in told) == 200


@pytest.mark.slow
def test_disk_that_refuses_at_any_point_ends_all_ranks_and_the_run_goes_on(tmp_path):
    told = crash("errors", tmp_path, 3)
    assert_survived(told)
    assert len(told) == len(crashes.WRITES) * 2 * len(crashes.ERRORS)


@pytest.mark.parametrize("every", [15, pytest.param(1, marks=pytest.mark.slow)])
def test_power_cut_after_any_sync_is_survived(tmp_path, every):
    told = crash("disk", tmp_path, every)
    print(f"{len(told)} states")
    assert sum("commit" in crash for crash in told) == 3  # two blocks and the end
    assert sum("state" in crash for crash in told) >= (8 if every > 1 else 50)
    assert_survived(told)


class TestDisk:
    """The model of the disk forgets what was not synced."""

    @pytest.fixture
    def disk(self, tmp_path, monkeypatch) -> Disk:
        for name in ("fsync", "unlink", "replace"):
            monkeypatch.setattr(os, name, getattr(os, name))  # restored at the end
        (tmp_path / "disk").mkdir()
        return Disk(tmp_path / "disk", tmp_path / "states")

    def test_file_written_whole_is_there(self, disk):
        write_text(disk.root / "folder" / "a.txt", "a")
        assert disk.durable(disk.root) == {"folder": None, "folder/a.txt": b"a"}

    @pytest.mark.parametrize("forgotten", ["bytes", "names"])
    def test_committed_file_whose_sync_is_missing_is_found(self, disk, monkeypatch, forgotten):
        sync, left_out = files.sync, {"names": Path.is_dir, "bytes": Path.is_file}[forgotten]
        first, second = (disk.root / "blocks" / name for name in ("0.bin", "1.bin"))
        write_text(disk.root / "manifest.json", "{}")
        write_text(first, "codes")
        ledger.commit(disk.root, 0, [first])
        assert disk.lost(disk.root) == []
        with monkeypatch.context() as patched:
            patched.setattr(files, "sync", lambda path: None if left_out(path) else sync(path))
            write_text(second, "codes")
        ledger.commit(disk.root, 1, [second])
        assert disk.lost(disk.root) == ["blocks/1.bin"]

    def test_appended_line_is_there(self, disk):
        append_line(disk.root / "ledger", "first")
        append_line(disk.root / "ledger", "second")
        assert disk.durable(disk.root) == {"ledger": b"first\nsecond\n"}

    def test_name_that_was_not_synced_is_not(self, disk):
        with open(disk.root / "a.txt", "w") as file:
            file.write("a")
            file.flush()
            os.fsync(file.fileno())
        assert disk.durable(disk.root) == {} and disk.live(disk.root) == {"a.txt": b"a"}

    def test_bytes_that_were_not_synced_are_not_even_under_a_new_name(self, disk):
        (disk.root / "a.txt").write_text("a")
        os.replace(disk.root / "a.txt", disk.root / "b.txt")
        assert disk.live(disk.root) == {"b.txt": b""}

    def test_deleted_file_is_there_until_its_folder_is_synced(self, disk):
        write_text(disk.root / "a.txt", "a")
        (disk.root / "a.txt").unlink()
        (disk.root / "b.txt").write_text("another file, likely of the same number")
        assert disk.durable(disk.root) == {"a.txt": b"a"} and disk.live(disk.root) == {"b.txt": b""}
        write_text(disk.root / "c.txt", "c")
        assert "a.txt" not in disk.durable(disk.root)
