"""What a command and all its descendants cost: CPU seconds and memory, also of processes that outlive their parents."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

_PR_SET_CHILD_SUBREAPER = 36
_SECONDS_BETWEEN_LOOKS = 0.1


@dataclass(frozen=True)
class Cost:
    """Of one command."""

    returncode: int
    wall_seconds: float
    cpu_seconds: float
    """User and system, of all processes."""
    peak_memory_mb: float
    """Largest sum over processes alive at one time of what each has alone and its part of what is shared (PSS)."""
    output_tail: str


def measure(command: Sequence[str], timeout: float = 1200.0) -> Cost:
    """Run a command under a process that adopts and awaits whatever it leaves behind."""
    watched = [sys.executable, "-m", "benchmarks.process_tree", *command]
    done = subprocess.run(
        watched,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=True,
        cwd=Path(__file__).parents[1],
    )
    return Cost(**json.loads(done.stdout.splitlines()[-1]))


def _watch(command: list[str]) -> Cost:
    """Runs in a process of its own, so that it has no other children."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    begun = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines: list[str] = []
    assert process.stdout is not None
    reader = threading.Thread(target=lines.extend, args=(process.stdout,), daemon=True)
    reader.start()
    peak, me = 0, psutil.Process()
    while process.poll() is None or me.children():
        peak = max(peak, sum(map(_memory, me.children(recursive=True))))
        _reap(process.pid)
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    wall = time.monotonic() - begun
    reader.join(timeout=5)
    times = os.times()
    return Cost(
        returncode=process.returncode,
        wall_seconds=round(wall, 2),
        cpu_seconds=round(times.children_user + times.children_system, 3),
        peak_memory_mb=round(peak / 1e6, 1),
        output_tail="".join(lines)[-3000:],
    )


def _memory(process: psutil.Process) -> int:
    try:
        for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):  # it has ended meanwhile
        return 0
    return 0


def _reap(main: int) -> None:
    """Wait for adopted processes, which counts their time; the main one is for Popen to wait for."""
    for child in psutil.Process().children():
        if child.pid != main:
            try:
                os.waitpid(child.pid, os.WNOHANG)
            except ChildProcessError:
                continue


if __name__ == "__main__":
    print(json.dumps(vars(_watch(sys.argv[1:]))))
