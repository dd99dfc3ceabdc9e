"""Run a command and measure what it costs: time, CPU seconds and memory of its whole process tree."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PAUSE_SECONDS = 0.05


@dataclass(frozen=True)
class Cost:
    """Of one command.

    Attributes:
        seconds: from start to end.
        cpu_seconds: user and system, of it and all that it waited for.
        peak_pss_mb: the largest sum over the tree of proportional set sizes seen, every 50 ms: memory that processes
            share counts once. The page cache does not count.
        output: stdout.
    """

    seconds: float
    cpu_seconds: float
    peak_pss_mb: float
    output: str


def cost_of(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Cost:
    """Run `command` to its end.

    Raises:
        RuntimeError: it failed; says what it wrote to stderr.
    """
    before = os.times()
    started = time.perf_counter()
    process = subprocess.Popen(
        list(command), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(environment or os.environ)
    )
    peak = [0.0]
    watcher = threading.Thread(target=_watch, args=(process, peak), daemon=True)
    watcher.start()
    output, errors = process.communicate()
    seconds = time.perf_counter() - started
    watcher.join()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed ({process.returncode}): {errors[-2000:]}")
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return Cost(seconds, cpu, peak[0], output)


def _watch(process: subprocess.Popen[str], peak: list[float]) -> None:
    while process.poll() is None:
        peak[0] = max(peak[0], sum(map(_pss_mb, _tree(process.pid))))
        time.sleep(PAUSE_SECONDS)


def _tree(root: int) -> list[int]:
    found = [root]
    for pid in found:
        for task in Path(f"/proc/{pid}/task").glob("*/children"):
            try:
                found += [int(child) for child in task.read_text().split()]
            except OSError:
                continue  # ended meanwhile
    return found


def _pss_mb(pid: int) -> float:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0  # ended meanwhile
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1e3
