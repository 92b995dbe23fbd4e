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
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from shardq.errors import StorageError
from shardq.logs import Display, Events, peak_device_bytes, peak_rss_bytes, print_error, tell_launcher


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


def test_span_that_was_timed_elsewhere_is_a_line_like_others(tmp_path):
    Events(tmp_path / "events.jsonl", rank=2).record("start-up", 1.23456789, block=4)
    [event] = lines_of(tmp_path / "events.jsonl")
    del event["time"]
    assert event == {"rank": 2, "span": "start-up", "seconds": 1.234568, "block": 4}


def test_waiting_counts_in_the_innermost_span_by_kind(tmp_path):
    events = Events(tmp_path / "events.jsonl", rank=0)
    with events.span("outer"):
        with events.span("inner"):
            for _ in range(2):
                with events.waiting("input"):
                    time.sleep(0.03)
            with events.waiting("output"):
                pass
        with events.waiting("output"):
            time.sleep(0.03)
    inner, outer = lines_of(tmp_path / "events.jsonl")
    assert 0.06 <= inner["waiting_for_input"] <= inner["seconds"]
    assert 0 <= inner["waiting_for_output"] < 0.03
    assert 0.03 <= outer["waiting_for_output"] <= outer["seconds"] - inner["seconds"] + 0.001
    assert "waiting_for_input" not in outer


def test_waiting_outside_of_spans_is_not_counted(tmp_path):
    events = Events(tmp_path / "events.jsonl", rank=0)
    with events.waiting("input"):
        pass
    with events.span("later"):
        pass
    [event] = lines_of(tmp_path / "events.jsonl")
    assert "waiting_for_input" not in event


def test_waiting_that_fails_is_counted_and_the_span_before_goes_on(tmp_path):
    events = Events(tmp_path / "events.jsonl", rank=0)
    with events.span("outer"):
        with pytest.raises(ZeroDivisionError), events.span("fails"):
            with events.waiting("input"):
                raise ZeroDivisionError
        with events.waiting("output"):
            pass
    [event] = lines_of(tmp_path / "events.jsonl")
    assert event["span"] == "outer" and "waiting_for_output" in event and "waiting_for_input" not in event


def test_seconds_since_the_process_start_count_imports():
    command = "import time; time.sleep(0.5); import shardq.logs as l; print(l.seconds_since_process_start())"
    start = time.monotonic()
    child = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    whole = time.monotonic() - start
    assert 0.5 < float(child.stdout) <= whole + 0.02  # the kernel notes the start in hundredths


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


def test_events_that_cannot_be_written_are_named(tmp_path):
    path = tmp_path / "gone" / "events.jsonl"
    with pytest.raises(StorageError) as caught, Events(path, rank=0).span("train"):
        pass
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("speaker, shown", [("", ""), ("rank 3 on gpu-7", "[rank 3 on gpu-7] ")])
def test_error_is_one_line_on_standard_error(capsys, speaker: str, shown: str):
    print_error("disk is full", speaker)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", f"shardq: {shown}disk is full\n")


def test_error_on_a_terminal_brings_the_cursor_back(capsys, monkeypatch):
    """A progress bar has hidden it, and a rank that is ended by another's failure cannot end the bar."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    print_error("disk is full")
    assert capsys.readouterr().err == "\r\033[?25hshardq: disk is full\n"


def test_rank_0_prints_lines_as_they_are(capsys):
    text = "block [bold]1[/bold] of /a/[12]/b " + "long " * 60
    Display(rank=0).line(text)
    assert capsys.readouterr().out == text + "\n"


class Loss:
    """A loss on a device, where reading it is what costs time."""

    def __init__(self, value: float, read: list[float]):
        self.value, self.read = value, read

    def item(self) -> float:
        self.read.append(self.value)
        return self.value


def show_a_run(display: Display, num_iterations: int = 3) -> list[float]:
    """A run's calls; gives the losses that were read."""
    read: list[float] = []
    with display.bars(num=2, first=1):
        display.start_block("layers.1")
        display.start_training(0, num_iterations)
        for number in range(num_iterations):
            display.advance_iteration(Loss(float(number), read))
        display.advance_block()
        display.line("block 2/2")
    return read


@pytest.mark.parametrize("terminal", [False, True], ids=["file", "terminal"])
@pytest.mark.parametrize("rank", [1, 7])
def test_other_ranks_are_silent(capsys, monkeypatch, rank: int, terminal: bool):
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
    assert show_a_run(Display(rank), 200) == [], "a loss was read though nobody sees it"
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_no_bar_is_drawn_into_a_file(capsys, monkeypatch):
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    assert show_a_run(Display(rank=0), 200) == [], "a loss was read though nobody sees it"
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("block 2/2\n", "")


def test_bar_on_a_terminal_shows_block_and_counts(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    show_a_run(Display(rank=0))
    drawn = capsys.readouterr().out
    assert "block 2/2" in drawn and "layers.1" in drawn
    assert "2/2" in drawn.replace("block 2/2", "") and "3/3" in drawn and "0/0" not in drawn


def test_bar_shows_the_loss_but_reads_it_only_now_and_then(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    assert show_a_run(Display(rank=0), 120) == [49.0, 99.0]
    assert "layers.1 loss 9.900e+01" in capsys.readouterr().out


def test_parts_of_a_long_work_are_lines_where_there_is_no_bar(capsys, monkeypatch):
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    display = Display(rank=0)
    with display.bars(num=2, first=0):
        for number in range(2):
            display.start_part("block", number, 2)
    assert capsys.readouterr().out == "block 1/2\nblock 2/2\n"


def test_parts_of_a_long_work_move_the_bar_where_there_is_one(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    display = Display(rank=0)
    with display.bars(num=9, first=0):
        for number in range(3):
            display.start_part("tracing", number, 3)
    drawn = capsys.readouterr().out
    assert "tracing" in drawn and "2/3" in drawn and "tracing 1/3" not in drawn


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


def test_torchruns_report_says_why_a_rank_ended(tmp_path, monkeypatch):
    """As torch reads what a rank has left for it."""
    path = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    tell_launcher("disk is full; make room", 5)
    failure = ProcessFailure(local_rank=1, pid=7, exitcode=5, error_file=str(path))
    report = ChildFailedError("quantize", {1: failure}).format_msg()
    assert report.splitlines()[-2] == "  traceback : shardq: disk is full; make room"


@pytest.mark.parametrize("place", [None, "/proc/nowhere/error.json"])
def test_nothing_is_told_where_there_is_no_torchrun(monkeypatch, place):
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    if place:
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", place)
    tell_launcher("disk is full", 5)
