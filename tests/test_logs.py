"""What a run leaves to read: one JSON line a span from every rank, console lines from rank 0 only."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from shardq.errors import StorageError
from shardq.logs import Display, Events, peak_device_bytes, peak_rss_bytes


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_span_is_one_json_line_with_name_rank_and_facts(tmp_path):
    with Events(tmp_path / "events.jsonl", rank=3).span("train", block=7) as facts:
        facts["loss"] = 0.25
    [event] = lines_of(tmp_path / "events.jsonl")
    assert (event["span"], event["rank"], event["block"], event["loss"]) == ("train", 3, 7, 0.25)


def test_span_says_how_long_and_when(tmp_path):
    start = time.time()
    with Events(tmp_path / "events.jsonl", rank=0).span("sleep"):
        time.sleep(0.05)
    [event] = lines_of(tmp_path / "events.jsonl")
    assert 0.05 <= event["seconds"] <= time.time() - start + 0.001
    assert start <= event["time"] + 0.001 and event["time"] <= time.time() + 0.001


def test_inner_span_ends_first(tmp_path):
    events = Events(tmp_path / "events.jsonl", rank=0)
    with events.span("outer"), events.span("inner"):
        pass
    inner, outer = lines_of(tmp_path / "events.jsonl")
    assert (inner["span"], outer["span"]) == ("inner", "outer")
    assert inner["seconds"] <= outer["seconds"]


def test_span_that_fails_is_not_written(tmp_path):
    events = Events(tmp_path / "events.jsonl", rank=0)
    with pytest.raises(ZeroDivisionError), events.span("fails"):
        raise ZeroDivisionError
    with events.span("works"):
        pass
    assert [event["span"] for event in lines_of(tmp_path / "events.jsonl")] == ["works"]


def test_lines_of_several_ranks_do_not_mix(tmp_path):
    def write(rank: int) -> None:
        events = Events(tmp_path / "events.jsonl", rank)
        for number in range(50):
            with events.span("span", number=number, filler="x" * 5000):
                pass

    threads = [threading.Thread(target=write, args=(rank,)) for rank in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = [(event["rank"], event["number"]) for event in lines_of(tmp_path / "events.jsonl")]
    assert sorted(found) == [(rank, number) for rank in range(4) for number in range(50)]


def test_events_without_a_file_are_dropped(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Events(None, rank=0).span("train") as facts:
        facts["loss"] = 1.0
    assert list(tmp_path.iterdir()) == []


def test_events_that_cannot_be_written_are_named(tmp_path):
    path = tmp_path / "gone" / "events.jsonl"
    with pytest.raises(StorageError) as caught, Events(path, rank=0).span("train"):
        pass
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_rank_0_prints_lines_as_they_are(capsys):
    text = "block [bold]1[/bold] of /a/[12]/b " + "long " * 60
    Display(rank=0).line(text)
    assert capsys.readouterr().out == text + "\n"


def show_a_run(display: Display) -> None:
    with display.bars(num_blocks=2, first_block=1, num_iterations=3):
        display.start_block("layers.1")
        for _ in range(3):
            display.advance_iteration()
        display.advance_block()
        display.line("block 2/2")


@pytest.mark.parametrize("terminal", [False, True], ids=["file", "terminal"])
@pytest.mark.parametrize("rank", [1, 7])
def test_other_ranks_are_silent(capsys, monkeypatch, rank: int, terminal: bool):
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
    show_a_run(Display(rank))
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_no_bar_is_drawn_into_a_file(capsys, monkeypatch):
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    show_a_run(Display(rank=0))
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("block 2/2\n", "")


def test_bar_on_a_terminal_shows_block_and_counts(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    show_a_run(Display(rank=0))
    drawn = capsys.readouterr().out
    assert "block 2/2" in drawn and "layers.1" in drawn
    assert "2/2" in drawn.replace("block 2/2", "") and "3/3" in drawn


def test_peak_memory_is_in_bytes():
    """Not below what the kernel gives for this process, nor above the machine's memory."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    kernel_bytes = int(line.split()[1]) * 1024
    machine_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for peak in (peak_rss_bytes(), peak_device_bytes(torch.device("cpu"))):
        assert 0.95 * kernel_bytes <= peak <= machine_bytes


def test_peak_memory_is_not_that_of_the_program_that_started_this_one():
    ballast = bytearray(1 << 30)
    ballast[::4096] = b"x" * len(ballast[::4096])
    command = "from shardq.logs import peak_rss_bytes; print(peak_rss_bytes())"
    child = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert int(child.stdout) < len(ballast)
