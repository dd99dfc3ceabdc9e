"""A rank's heartbeat: a small file in the run's folder, the one thing that ranks of a hung run still share."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

from training.survival.pulse import Phase

RECORD_BYTES = 4096


@dataclass(frozen=True)
class Who:
    """A rank and the process that it is.

    Attributes:
        node: host name.
        processes: names the space that `pid` counts in; equal only for processes that see each other in /proc.
        started: start of the process in clock ticks, so that a number used again is not taken for it.
        address, port: where its node takes connections; "" and 0 where the run has one node.
    """

    rank: int
    local_rank: int
    node: str
    pid: int
    processes: str
    started: str
    address: str = ""
    port: int = 0


@dataclass(frozen=True)
class Wait:
    """What a main thread is blocked in.

    Attributes:
        operation: the collective, as torch names it.
        asked_by: file and line of the code that called it.
        group: torch's name of the process group, "" where it is not known.
        ranks: of that group.
    """

    operation: str
    asked_by: str
    group: str = ""
    ranks: tuple[int, ...] = ()


@dataclass(frozen=True)
class Details:
    """What a rank says when it has not got on for a while.

    Attributes:
        wait: None where the main thread is at work.
        at: file, line and function of the main thread, ours and megatron-core's innermost first.
        sequences: collectives begun, by group.
        unreachable: nodes that this rank's could not connect to.
    """

    wait: Wait | None
    at: tuple[str, ...]
    sequences: dict[str, int] = field(default_factory=dict)
    unreachable: tuple[str, ...] = ()


@dataclass(frozen=True)
class Beat:
    """One heartbeat.

    Attributes:
        number: one more each time.
        stalled: seconds since the last progress.
        details: None while the rank gets on.
    """

    who: Who
    number: int
    step: int
    phase: Phase
    stalled: float
    details: Details | None = None


def path_of(folder: Path, rank: int) -> Path:
    """Where a rank's heartbeat lies."""
    return folder / f"rank-{rank:05d}.json"


def write_beat(folder: Path, beat: Beat) -> None:
    """Overwrite this rank's heartbeat in place: no new file, no rename, no flush to the disk.

    It is closed each time, because a network file system shows others what was written before a close.

    Raises:
        OSError: the folder is gone, or the file system does not answer.
    """
    text = json.dumps(asdict(beat)).encode()
    padded = text.ljust(-(-(len(text) + 1) // RECORD_BYTES) * RECORD_BYTES - 1) + b"\n"
    handle = os.open(path_of(folder, beat.who.rank), os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        os.pwrite(handle, padded, 0)
        os.ftruncate(handle, len(padded))
    finally:
        os.close(handle)


def read_beat(folder: Path, rank: int) -> Beat | None:
    """A rank's last heartbeat; None where it has none, is writing it at this moment, or the file system is at fault."""
    try:
        values = json.loads(path_of(folder, rank).read_bytes())
    except (OSError, ValueError):
        return None
    details = values.pop("details")
    who = Who(**values.pop("who"))
    if details is not None:
        wait = details.pop("wait")
        if wait is not None:
            wait = Wait(**{**wait, "ranks": tuple(wait["ranks"])})
        details = Details(wait, tuple(details["at"]), details["sequences"], tuple(details["unreachable"]))
    return Beat(who=who, details=details, **values)
