"""Whether a run can have the folder that it asks for."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from foundation.errors import ConfigError, RequestError
from training.survival.heartbeat import read_beat
from training.survival.processes import own_processes, state_of

if TYPE_CHECKING:
    from launch.config import RunConfig

WATCH = "watch"
"""RUN/watch/LIFE: heartbeats of the ranks of a life, and the verdict that ended it."""


def run_folder_is_writable(config: RunConfig) -> None:
    """The run's folder can be made and written: tried with a real file in the nearest folder that exists."""
    folder = config.run.folder.absolute()
    try:
        nearest = next(place for place in (folder, *folder.parents) if place.exists())
    except OSError as error:
        raise ConfigError(
            "run.folder",
            str(config.run.folder),
            rule=f"is a name that the system can look up: {error.strerror}",
            cure="run.folder=runs/first",
        ) from None
    if not nearest.is_dir():
        raise ConfigError(
            "run.folder",
            str(config.run.folder),
            rule=f"is a folder or can become one, and {nearest} is a file",
            cure=f"run.folder={_free_name(nearest)}",
        )
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise ConfigError(
            "run.folder",
            str(config.run.folder),
            rule=f"can be written, and {nearest} refuses a file: {error.strerror}",
            cure="run.folder=runs/first, or another place where you may write",
        ) from None


def refuse_while_it_runs(folder: Path) -> None:
    """Refuse a second start in a run's folder while ranks of the first live on this machine.

    Where ranks are started by srun or torchrun the later start takes the run over (`launch.life`): what a requeued job
    finds are leftovers. Here it is a person at two terminals, or a launcher that was killed and left its ranks at work.

    Raises:
        RequestError: such ranks live.
    """
    here = own_processes()
    beats = [
        read_beat(life, int(path.stem.removeprefix("rank-")))
        for life in (folder / WATCH).glob("life-*")
        for path in life.glob("rank-*.json")
    ]
    alive = sorted(
        beat.who.pid
        for beat in beats
        if beat is not None and beat.who.processes == here and state_of(beat.who, here) != "dead"
    )
    if alive:
        numbers = " ".join(map(str, alive))
        raise RequestError(
            f"{folder} is in use: its run goes on in process{'es' if len(alive) > 1 else ''} {numbers} of this machine",
            where=str(folder),
            rule="a run's folder has one start at work in it: two would write the same checkpoints and metrics",
            cure=f"wait for its end, or kill {numbers} (it saves first), or take another run.folder",
        )


def _free_name(taken: Path) -> Path:
    return next(name for number in range(1, 10_000) if not (name := Path(f"{taken}_{number}")).exists())
