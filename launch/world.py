"""Whether this process is already one rank of a world that torchrun or srun started, and which."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from foundation.errors import RequestError

MEETING_POINT = ("MASTER_ADDR", "MASTER_PORT")
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", *MEETING_POINT)
SRUN = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", *MEETING_POINT)


@dataclass(frozen=True)
class World:
    """This process' place among the ranks."""

    rank: int
    world_size: int
    local_rank: int


def world_from_environment(environment: Mapping[str, str] = os.environ) -> World | None:
    """The world that a launcher announced, None where this process was started by hand.

    torchrun sets RANK, WORLD_SIZE and LOCAL_RANK; a Slurm step of several tasks sets SLURM_PROCID, SLURM_STEP_NUM_TASKS
    and SLURM_LOCALID, and the batch script has to name the meeting point in MASTER_ADDR and MASTER_PORT. Where the
    tasks of a step started torchrun, that has the last word. A step of one task is a shell (`srun --pty bash`) or one
    rank: as by hand. So is a batch script itself, which Slurm gives SLURM_PROCID and SLURM_NTASKS, but no step.

    Raises:
        RequestError: a launcher announced a part of a world only, or an impossible one.
    """
    if "RANK" in environment or "WORLD_SIZE" in environment:
        return _announced(environment, TORCHRUN, "torchrun")
    if environment.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        return _announced(environment, SRUN, "srun")
    return None


def _announced(environment: Mapping[str, str], names: tuple[str, ...], launcher: str) -> World:
    """The world of `names`: rank, world size, local rank and the meeting point."""
    rule = f"a rank under {launcher} needs {', '.join(names)}"
    if launcher == "srun":
        cure = "export MASTER_ADDR and MASTER_PORT in the batch script before srun, as slurm/pretrain.sbatch does"
    else:
        cure = "start through torchrun; or, where they are left over in this shell: unset RANK WORLD_SIZE LOCAL_RANK"
    missing = [name for name in names if not environment.get(name)]
    if missing:
        raise RequestError(
            f"the environment announces a world by {launcher}, but {', '.join(missing)} is not set",
            rule=rule,
            cure=cure,
        )
    shown = ", ".join(f"{name}={environment[name]}" for name in names[:3])
    try:
        rank, world_size, local_rank = (int(environment[name]) for name in names[:3])
    except ValueError:
        raise RequestError(
            f"the environment announces {shown}", rule="ranks and their number are whole numbers", cure=cure
        ) from None
    if not 0 <= local_rank <= rank < world_size:
        raise RequestError(
            f"the environment announces {shown}",
            rule=f"0 <= {names[2]} <= {names[0]} < {names[1]}",
            cure=cure,
        )
    port = environment["MASTER_PORT"]
    if not (port.isdecimal() and len(port) < 6 and 0 < int(port) < 65536):
        raise RequestError(
            f"the environment announces MASTER_PORT={port}", rule="a port is a whole number, 1 to 65535", cure=cure
        )
    return World(rank, world_size, local_rank)
