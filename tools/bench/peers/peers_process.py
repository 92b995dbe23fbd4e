"""A whole process and what it cost: wall and CPU time, memory, and how busy the machine was with other work."""

import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Cost:
    """What a process and the children it waited for cost.

    Attributes:
        wall_seconds: from start to exit.
        cpu_seconds: user and system time.
        rusage_max_rss_bytes: largest resident memory of any one of them.
        other_cpu_share: part of all cores' time that went to anything else, other virtual machines included, 0 to 1.
    """

    wall_seconds: float
    cpu_seconds: float
    rusage_max_rss_bytes: int
    other_cpu_share: float


class ProcessFailed(Exception):
    """A process ended with an exit code other than 0; one line."""


def run_process(command: list[str], log: Path, environment: dict[str, str], folder: Path) -> tuple[str, Cost]:
    """Run a command in a folder to its end; standard output goes to `log`.out, standard error to `log`.err.

    Args:
        environment: variables to set beside the present ones.

    Returns:
        The last line of standard output, and the cost.

    Raises:
        ProcessFailed: it cannot be started, or its exit code is not 0.
    """
    output, errors = log.with_suffix(".out"), log.with_suffix(".err")
    busy, start = busy_cpu_seconds(), time.perf_counter()
    with open(output, "wb") as out, open(errors, "wb") as err:
        try:
            process = subprocess.Popen(command, stdout=out, stderr=err, cwd=folder, env=os.environ | environment)
        except OSError as error:
            raise ProcessFailed(f"{command[0]}: cannot be started ({error.strerror}); check the path") from error
        usage = _wait(process)
    wall, busy = time.perf_counter() - start, busy_cpu_seconds() - busy
    if process.returncode:
        reason = last_line(errors.read_text(errors="replace")) or "no message"
        raise ProcessFailed(f"{command[1]}: exit code {process.returncode}: {reason}; --output keeps its log")
    cpu = usage.ru_utime + usage.ru_stime
    cost = Cost(wall, cpu, usage.ru_maxrss * 1024, other_share(busy, cpu, wall, os.cpu_count()))
    return last_line(output.read_text(errors="replace")), cost


def _wait(process: subprocess.Popen) -> "os.struct_rusage":
    """Wait for a process, ending it if this one is interrupted; give its own resource usage, which Popen does not."""
    try:
        _, status, usage = os.wait4(process.pid, 0)
    except BaseException:
        process.terminate()
        process.wait()
        raise
    process.returncode = os.waitstatus_to_exitcode(status)
    return usage


def busy_cpu_seconds() -> float:
    """Time that all cores together have not been idle since the machine started, other virtual machines' included."""
    with open("/proc/stat") as file:
        return busy_ticks(file.readline()) / os.sysconf("SC_CLK_TCK")


def busy_ticks(line: str) -> int:
    """Busy clock ticks in the first line of /proc/stat: user, nice, system, irq, softirq and steal."""
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, line.split()[1:9])
    return user + nice + system + irq + softirq + steal


def other_share(busy: float, own: float, wall: float, cores: int) -> float:
    """Share of all cores' time that was busy with anything but the process itself; seconds, 0 to 1."""
    return max(0.0, busy - own) / (wall * cores)


def last_line(text: str) -> str:
    """The last line that is not empty, or an empty string."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")
