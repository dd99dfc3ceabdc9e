"""Whether a run can have the folder that it asks for."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from foundation.errors import ConfigError

if TYPE_CHECKING:
    from launch.config import RunConfig


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


def _free_name(taken: Path) -> Path:
    return next(name for number in range(1, 10_000) if not (name := Path(f"{taken}_{number}")).exists())
