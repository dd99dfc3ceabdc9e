"""How ranks that srun or torchrun started come to the same job: rank 0 writes it, the others wait for it."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from foundation.errors import FaultError
from launch.terminal import say
from launch.world import World

JOB = "job.json"
START = "start"
"""Key in job.json: which start of the ranks it was written for."""
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
    world: World,
    folder: Path,
    config: Mapping[str, Any],
    prepare: Callable[[], Path],
    listen: Callable[[], None] = nobody_ends,
) -> Path:
    """The job's file in the run's `folder`: rank 0 prepares it, others wait until it is there for this start.

    Ranks wait without a limit, as preparing data may take hours; where rank 0 ends, they hear of it, or the
    launcher ends them.

    Args:
        config: plain values; a job of another configuration is an older one.
        listen: to the other ranks; raises where one of them ends.
    """
    if world.rank == 0:
        return prepare()
    path, key, wanted = folder / JOB, start_key(), json.loads(json.dumps(config))
    said = time.monotonic()
    while not _is_the_job(path, key, wanted):
        listen()
        time.sleep(POLL_SECONDS)
        if time.monotonic() - said > PATIENCE_SECONDS:
            said = time.monotonic()
            say(f"rank {world.rank} waits for rank 0, which prepares the data")
    return path


def _is_the_job(path: Path, key: str, config: Mapping[str, Any]) -> bool:
    try:
        job = json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    return bool(job.get(START) == key and job["config"] == config)


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
