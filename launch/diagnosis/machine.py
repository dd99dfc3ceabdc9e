"""Cores, memory, disk."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

from launch.diagnosis.asking import in_gib
from launch.diagnosis.finding import Finding

LEAST_SHARED_MEMORY = 64 << 20
"""Bytes of /dev/shm below which ranks on one machine fail to talk (containers give 64 MiB by default)."""


def machine() -> list[Finding]:
    """Cores, memory, shared memory and disk, as this process may use them."""
    cores = len(os.sched_getaffinity(0))
    disk = shutil.disk_usage(Path.cwd())
    found = [
        Finding("machine", "Python", "ok", f"{sys.version.split()[0]} ({sys.executable})"),
        Finding("machine", "cores", "ok", f"{cores} for this process, {os.cpu_count()} in all"),
        Finding("machine", "memory", "ok", f"{in_gib(memory_bytes())} for this process"),
        Finding("machine", "disk", "ok", f"{in_gib(disk.free)} free of {in_gib(disk.total)} at {Path.cwd()}"),
    ]
    shared = Path("/dev/shm")
    if shared.is_dir() and (total := shutil.disk_usage(shared).total) <= LEAST_SHARED_MEMORY:
        fix = "start the container with --shm-size=8g (or --ipc=host)"
        found.append(Finding("machine", "shared memory", "note", f"{total >> 20} MiB in /dev/shm", fix))
    return found


def memory_bytes(root: Path = Path("/")) -> int:
    """Bytes of memory: the machine's, or the control group's limit where that is lower."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory/memory.limit_in_bytes"):
        file = root / limit
        if file.is_file() and re.fullmatch(r"\d+", text := file.read_text().strip()):
            total = min(total, int(text))
    return total
