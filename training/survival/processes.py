"""What the kernel of this machine says of a process."""

from __future__ import annotations

import subprocess
from pathlib import Path

from training.survival.heartbeat import Who

STATES = {"T": "stopped", "t": "stopped", "Z": "dead", "X": "dead", "D": "waiting for a disk"}


def own_processes() -> str:
    """Names the space that process numbers of this process count in: machine, boot and PID namespace."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {Path('/proc/self/ns/pid').readlink()}"


def start_of(pid: int) -> str:
    """When a process started, in clock ticks since boot; "" where there is none."""
    fields = _stat(pid)
    return "" if fields is None else fields[19]


def state_of(who: Who, processes: str) -> str | None:
    """`stopped`, `dead` or `waiting for a disk`; None where it runs or is on another machine."""
    if who.processes != processes:
        return None
    fields = _stat(who.pid)
    if fields is None or fields[19] != who.started:
        return "dead"
    return STATES.get(fields[0])


def end_stopped(who: Who, processes: str) -> None:
    """Kill a rank of this run that stands still, a second from now.

    A stopped process would outlive the run until the launcher's last resort, half a minute later. The ranks that can
    speak leave first, so that the launcher hears from them why.
    """
    if state_of(who, processes) == "stopped":
        subprocess.Popen(
            ["sh", "-c", f"sleep 1; kill -KILL {who.pid}"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )


def _stat(pid: int) -> list[str] | None:
    """Fields of /proc/PID/stat from the state on (proc(5), field 3)."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return text.rpartition(")")[2].split()
