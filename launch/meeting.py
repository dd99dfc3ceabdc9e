"""How ranks that srun or torchrun started come to the same job: rank 0 writes it, the others wait for it."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from foundation.errors import ConfigError, FaultError
from launch.roll_call import RollCall
from launch.terminal import say
from launch.world import World

JOB = "job.json"
NAMES = ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_STEP_ID", "TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT")
POLL_SECONDS = 0.1
PATIENCE_SECONDS = 60.0
"""How often a waiting rank says that it waits."""


def start_key(environment: Mapping[str, str] = os.environ) -> str:
    """What the ranks that one launcher started together have in common."""
    return " ".join(f"{name}={environment[name]}" for name in NAMES if name in environment)


def nobody_ends() -> None:
    """Where nobody listens to the other ranks."""


def job_of_rank_0(
    world: World, folder: Path, config: Mapping[str, Any], prepare: Callable[[], Path], call: RollCall
) -> Path:
    """The job's file in the run's `folder`: rank 0 prepares it, others wait until that very file is there.

    Ranks wait without a limit, as preparing data may take hours; where rank 0 ends, they hear of it. What lies there
    of an earlier start, which another version may have written, is not read.

    Args:
        config: plain values, as this rank has read them.

    Raises:
        RequestError: rank 0 has read another configuration; or what another rank refuses.
    """
    if world.rank == 0:
        path = prepare()
        call.announce(_digest(path.read_bytes()))
        return path
    path = folder / JOB
    job, said = None, time.monotonic()
    while job is None:
        call.listen()
        job = _the_job(path, call.announced())
        if job is None:
            time.sleep(POLL_SECONDS)
        if time.monotonic() - said > PATIENCE_SECONDS:
            said = time.monotonic()
            what = "which prepares the data" if call.announced() is None else f"whose {path} is not here yet"
            say(f"rank {world.rank} waits for rank 0, {what}")
    _check_same(json.loads(json.dumps(config)), job["config"], world)
    return path


def _the_job(path: Path, digest: str | None) -> dict[str, Any] | None:
    """None where the file is not there yet; another node may see it late."""
    try:
        read = path.read_bytes()
    except OSError:
        return None
    return dict(json.loads(read)) if digest == _digest(read) else None


def _digest(read: bytes) -> str:
    return hashlib.sha256(read).hexdigest()


def _check_same(own: Mapping[str, Any], of_rank_0: Mapping[str, Any], world: World) -> None:
    """Refuse what differs between the ranks: nodes with another file, another home folder or other overrides."""
    mine, theirs = _flat(own), _flat(of_rank_0)
    other = [name for name in sorted({*mine, *theirs}) if mine.get(name) != theirs.get(name)]
    if other:
        raise ConfigError(
            other[0],
            mine.get(other[0]),
            rule=f"is the same on all ranks, and rank {world.rank} on {socket.gethostname()} has read another than "
            f"rank 0, which has {theirs.get(other[0])!r}",
            cure="the same file and the same overrides on every node, with paths that mean the same there",
        )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """By dotted names."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def stop_before_the_first_step() -> None:
    """Until the trainer listens itself, a request to stop ends this rank with a message and the code of a fault.

    Slurm may cancel a step that has just begun, because of a node that came back from a fault of the life before: the
    run has to be started once more. A batch script that was asked to stop, or whose ranks refused the request first,
    knows that by itself.
    """

    def end(number: int, _frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        print(f"stopped by {name} before the first step; nothing to save", file=sys.stderr, flush=True)
        os._exit(FaultError.exit_code)

    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, end)
