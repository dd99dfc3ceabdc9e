"""Whether this process is already one rank of a world that torchrun or srun started, and which."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from foundation.errors import RequestError

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class World:
    """This process' place among the ranks."""

    rank: int
    world_size: int
    local_rank: int


def world_from_environment(environment: Mapping[str, str] = os.environ) -> World | None:
    """The world that a launcher announced, None where this process was started by hand.

    torchrun sets RANK, WORLD_SIZE and LOCAL_RANK; a Slurm step of several tasks sets SLURM_PROCID, SLURM_STEP_NUM_TASKS
    and SLURM_LOCALID, and the batch script has to name the meeting point in MASTER_ADDR and MASTER_PORT.

    Raises:
        RequestError: a launcher announced a part of a world only.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        _all_there(environment, TORCHRUN, "torchrun")
        return World(int(environment["RANK"]), int(environment["WORLD_SIZE"]), int(environment["LOCAL_RANK"]))
    if int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        _all_there(environment, ("SLURM_PROCID", "SLURM_LOCALID", "MASTER_ADDR", "MASTER_PORT"), "srun")
        tasks = int(environment["SLURM_STEP_NUM_TASKS"])
        return World(int(environment["SLURM_PROCID"]), tasks, int(environment["SLURM_LOCALID"]))
    return None


def _all_there(environment: Mapping[str, str], names: tuple[str, ...], launcher: str) -> None:
    missing = [name for name in names if name not in environment]
    if missing:
        raise RequestError(
            f"the environment announces a world by {launcher}, but {', '.join(missing)} is not set",
            rule=f"a rank under {launcher} needs {', '.join(names)}",
            cure="start through torchrun, or export MASTER_ADDR and MASTER_PORT in the batch script before srun",
        )
