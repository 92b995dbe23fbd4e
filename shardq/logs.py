"""Output of a run for people and programs: console lines, a progress bar, events.jsonl."""

import json
import os
import re
import resource
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from shardq.files import storage_errors

if TYPE_CHECKING:  # errors are printed before torch is imported, which takes seconds
    import torch
    from torch import Tensor

STEPS_A_LOSS = 50
SHOW_CURSOR = "\r\033[?25h"


def print_error(text: str, speaker: str = "") -> None:
    """Write one line on standard error, in one piece; `speaker` is the rank that the line is about, if that matters."""
    cursor = SHOW_CURSOR if sys.stderr.isatty() else ""  # a progress bar hides it, and may not come to its own end
    sys.stderr.write(f"{cursor}shardq: {f'[{speaker}] ' if speaker else ''}{text}\n")
    sys.stderr.flush()


def tell_launcher(words: str, exit_code: int) -> None:
    """Put the reason why this rank ends into torchrun's final report; does nothing without torchrun."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    more = {"timestamp": str(int(time.time())), "py_callstack": f"shardq: {words}"}
    report = {"message": {"message": words, "errorCode": exit_code, "extraInfo": more}}
    with suppress(OSError):  # the reason has been printed already
        Path(path).write_text(json.dumps(report), encoding="utf-8")


def peak_rss_bytes() -> int:
    """Largest resident memory of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count memory of the launcher before it executed this program
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text()).group(1)) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def peak_device_bytes(device: "torch.device") -> int:
    """Largest memory of this process on its device so far, in bytes: GPU memory, or resident memory on CPU."""
    import torch

    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_rss_bytes()


def seconds_since_process_start() -> float:
    """How long this process has been running, imports included; 0 where the system does not report it."""
    stat = Path("/proc/self/stat")
    if not stat.exists():
        return 0.0
    ticks = int(stat.read_text().rpartition(")")[2].split()[19])  # field 22 of proc(5), after the name in brackets
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Event:
    """A span that a rank has finished.

    Attributes:
        span: name of the span.
        seconds: duration.
        time: end of the span, in seconds since 1970.
        facts: further facts, such as `block`, `iterations` and waiting times.
    """

    span: str
    seconds: float
    rank: int
    time: float
    facts: dict[str, Any]

    @classmethod
    def parsed(cls, line: bytes) -> "Event":
        """The event of a line that `Events` has written.

        Raises:
            ValueError: the line is no event.
        """
        facts = json.loads(line)
        try:
            span, seconds, rank, when = (facts.pop(name) for name in ("span", "seconds", "rank", "time"))
        except (KeyError, AttributeError, TypeError) as error:
            raise ValueError("no event") from error
        return cls(span, seconds, rank, when, facts)


class Events:
    """Appends one JSON line per finished span to a log; every rank of a host writes to the same file.

    The spans of a block follow one another and lie directly inside `run`, so their seconds add up to it. A line is
    written by a single `write` to a file opened for appending, so lines of several ranks do not mix.
    """

    def __init__(self, path: Path, rank: int):
        self._path, self._rank = path, rank
        self._open: list[dict] = []

    @contextmanager
    def span(self, name: str, **facts: object) -> Iterator[dict]:
        """Time the body in seconds; facts that the body puts into the yielded dict are written too."""
        start = time.perf_counter()
        self._open.append(facts)
        try:
            yield facts
        finally:
            self._open.pop()
        self.record(name, time.perf_counter() - start, **facts)

    @contextmanager
    def waiting(self, kind: str) -> Iterator[None]:
        """Count the body's seconds as waiting, in the innermost span: for `input` or for `output`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            if self._open:
                facts, name = self._open[-1], f"waiting_for_{kind}"
                facts[name] = round(facts.get(name, 0.0) + time.perf_counter() - start, 6)

    def record(self, name: str, seconds: float, **facts: object) -> None:
        """Write a span that was timed elsewhere."""
        self._write({"span": name, "seconds": round(seconds, 6), **facts})

    def _write(self, event: dict) -> None:
        line = json.dumps({"time": round(time.time(), 3), "rank": self._rank, **event}) + "\n"
        with storage_errors(self._path), open(self._path, "a", encoding="utf-8") as file:
            file.write(line)


class Display:
    """Console of a run: lines, and on a terminal a bar with the time left; ranks other than 0 print nothing."""

    def __init__(self, rank: int):
        self._console = Console(quiet=rank != 0, soft_wrap=True, highlight=False)
        self._bar: Progress | None = None

    def line(self, text: str) -> None:
        """Print one line above the bar."""
        self._console.print(text, markup=False)

    def table(self, columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> None:
        """Print a table; a cell's text wraps within its column."""
        table = Table(*columns)
        for row in rows:
            table.add_row(*map(escape, row))
        self._console.print(table, soft_wrap=False)

    @contextmanager
    def bars(self, num: int, first: int, outer: str = "blocks", inner: str = "iterations") -> Iterator[None]:
        """Show a bar over blocks and one over the iterations of a block, where the output is a terminal.

        Args:
            num, first: units of the outer bar, and how many of them are done.
            outer, inner: names of the bars' units.
        """
        if not self._console.is_terminal or self._console.quiet:
            yield
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self._console, transient=True) as self._bar:
            self._blocks = self._bar.add_task(outer, total=num, completed=first)
            self._iterations = self._bar.add_task(inner, total=None)
            yield
        self._bar = None

    def start_block(self, name: str) -> None:
        """Begin a block."""
        self._name = name
        self.start_training(0)

    def start_part(self, what: str, number: int, total: int) -> None:
        """Begin part `number`, from 0, of long work: the inner bar shows it, or a line where there is no bar."""
        if self._bar:
            self._bar.reset(self._iterations, completed=number, total=total, description=what)
        else:
            self.line(f"{what} {number + 1}/{total}")

    def start_training(self, done: int, num_iterations: int | None = None) -> None:
        """Show that `done` of `num_iterations` are done (default: as many iterations as the block before)."""
        self._steps = done
        if self._bar:
            self._bar.reset(self._iterations, completed=done, total=num_iterations, description=self._name)

    def advance_iteration(self, loss: "Tensor | None" = None) -> None:
        """Count an optimizer step; its loss is read only sometimes, as reading waits for the device."""
        if not self._bar:
            return
        self._steps += 1
        if loss is not None and self._steps % STEPS_A_LOSS == 0:
            self._bar.update(self._iterations, description=f"{self._name} loss {loss.item():.3e}")
        self._bar.advance(self._iterations)

    def advance_block(self, steps: int = 1) -> None:
        """Count finished blocks; negative `steps` for blocks that have to be done again."""
        if self._bar:
            self._bar.advance(self._blocks, steps)
