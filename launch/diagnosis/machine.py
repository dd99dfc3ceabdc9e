"""Cores, memory, disk, limits."""

from __future__ import annotations

import os
import re
import resource
import shutil
import sys
import tempfile
from pathlib import Path

from launch.diagnosis.asking import in_gib
from launch.diagnosis.finding import Finding

LEAST_SHARED_MEMORY = 64 << 20
"""Bytes of /dev/shm below which ranks on one machine fail to talk (containers give 64 MiB by default)."""
LEAST_MEMORY = 3 << 30
"""Bytes with which the four ranks of `make train` fit."""
LEAST_DISK = 2 << 30
"""Bytes that a first run and its checkpoints never fill."""
LEAST_FILES, LEAST_PROCESSES = 1024, 1024


def machine() -> list[Finding]:
    """Cores, memory, disk, limits and names, as this process may use them."""
    return [python(), *cores(), memory(), *disk(), *shared_memory(), *limits(), *home(), *names()]


def python() -> Finding:
    """The interpreter."""
    return Finding("machine", "Python", "ok", f"{sys.version.split()[0]} ({sys.executable})")


def cores() -> list[Finding]:
    """Cores, and threads of each rank: more threads than cores make a step many times slower."""
    here = len(os.sched_getaffinity(0))
    found = [Finding("machine", "cores", "ok", f"{here} for this process, {os.cpu_count()} in all")]
    given = os.environ.get("OMP_NUM_THREADS")
    if given is None:
        return found
    name = "OMP_NUM_THREADS"
    if not given.isdecimal() or int(given) < 1:
        return [*found, Finding("machine", name, "note", f"{given!r} is no number of threads", f"unset {name}")]
    if int(given) > here:
        text = f"{given} threads a rank on {here} cores: many times slower than one a core"
        return [*found, Finding("machine", name, "note", text, f"unset {name} (cores are then shared out over ranks)")]
    return [*found, Finding("machine", name, "ok", f"{given} a rank")]


def memory() -> Finding:
    """Memory that is free; `make train` wants some."""
    whole, free = memory_bytes(), free_memory()
    text = f"{in_gib(whole)} for this process" + ("" if free is None else f", {in_gib(min(whole, free))} free")
    if min(whole, whole if free is None else free) < LEAST_MEMORY:
        fix = "fewer ranks at once (parallel.tensor_model_parallel_size=1 ...), or end what holds memory"
        return Finding("machine", "memory", "note", f"{text}: a rank on CPU takes about 0.5 GiB before its model", fix)
    return Finding("machine", "memory", "ok", text)


def disk() -> list[Finding]:
    """Room for runs where one works, and for what is temporary."""
    found = []
    for name, place in (("disk", Path.cwd()), ("temporary files", Path(tempfile.gettempdir()))):
        room = shutil.disk_usage(place)
        text = f"{in_gib(room.free)} free of {in_gib(room.total)} at {place}"
        if not os.access(place, os.W_OK | os.X_OK):
            fix = "work in a folder of yours, or run.folder=/a/folder/of/yours"
            found.append(Finding("machine", name, "note", f"{place} cannot be written", fix))
        elif room.free < LEAST_DISK:
            fix = "free some, or run.folder= on a larger disk" if name == "disk" else "export TMPDIR=/a/larger/disk"
            found.append(Finding("machine", name, "note", text, fix))
        elif name == "disk":
            found.append(Finding("machine", name, "ok", text))
    return found


def shared_memory() -> list[Finding]:
    """/dev/shm, by which ranks of one machine and readers of data talk."""
    shared, fix = Path("/dev/shm"), "start the container with --shm-size=8g (or --ipc=host)"
    if not shared.is_dir():
        return [Finding("machine", "shared memory", "note", "there is no /dev/shm", fix)]
    total = shutil.disk_usage(shared).total
    if total <= LEAST_SHARED_MEMORY:
        return [Finding("machine", "shared memory", "note", f"{total >> 20} MiB in /dev/shm", fix)]
    return []


def limits() -> list[Finding]:
    """What `ulimit` leaves: ranks hold files, connections and threads."""
    found = []
    for name, kind, least, flag in (
        ("open files", resource.RLIMIT_NOFILE, LEAST_FILES, "-n"),
        ("processes", resource.RLIMIT_NPROC, LEAST_PROCESSES, "-u"),
    ):
        soft, hard = resource.getrlimit(kind)
        if soft != resource.RLIM_INFINITY and soft < least:
            allowed = hard == resource.RLIM_INFINITY or hard >= least
            fix = f"ulimit {flag} {least}" if allowed else f"ask for more: the hard limit is {hard}"
            found.append(Finding("machine", name, "note", f"{soft} at most; {least} are needed for many ranks", fix))
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        text = f"{in_gib(soft)} of addresses: torch reserves far more than it uses"
        found.append(Finding("machine", "address space", "note", text, "ulimit -v unlimited"))
    return found


def home() -> list[Finding]:
    """The home folder, where libraries keep caches."""
    try:
        place = Path.home()
    except RuntimeError:
        return [Finding("machine", "home", "note", "there is none: libraries cannot cache", "export HOME=/a/folder")]
    if not os.access(place, os.W_OK | os.X_OK):
        fix = "export HOME=/a/folder/of/yours, or HF_HOME and XDG_CACHE_HOME"
        return [Finding("machine", "home", "note", f"{place} cannot be written: libraries cannot cache", fix)]
    return []


def names() -> list[Finding]:
    """Whether names of files may hold any letter."""
    encoding = sys.getfilesystemencoding().lower()
    if encoding in ("utf-8", "utf8"):
        return []
    text = f"names of files are read as {encoding}: others than its letters fail"
    return [Finding("machine", "locale", "note", text, "export LANG=C.UTF-8")]


def free_memory(root: Path = Path("/")) -> int | None:
    """Bytes that can be had without swapping; None where the kernel does not say."""
    file = root / "proc/meminfo"
    found = re.search(r"^MemAvailable:\s+(\d+) kB$", file.read_text(), re.MULTILINE) if file.is_file() else None
    return None if found is None else int(found[1]) << 10


def memory_bytes(root: Path = Path("/")) -> int:
    """Bytes of memory: the machine's, or the control group's limit where that is lower."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory/memory.limit_in_bytes"):
        file = root / limit
        if file.is_file() and re.fullmatch(r"\d+", text := file.read_text().strip()):
            total = min(total, int(text))
    return total
