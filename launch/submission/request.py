"""What a person asks Slurm for, and times as Slurm writes them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from foundation.errors import RequestError

Task = Literal["train", "sft", "reward", "dpo", "ppo"]
Launcher = Literal["srun", "torchrun"]

CHECKOUT = Path(__file__).resolve().parents[2]
"""Where this code lies; a job finds slurm/lib.sh there."""

_DURATION = re.compile(r"(?:(?P<days>\d+)-(?P<day_time>\d+(?::\d+){0,2})|(?P<time>\d+(?::\d+){0,2}))")
_IMAGE_FILE = re.compile(r"\.?\.?/.*|.*\.(sqsh|sqfs|squashfs)")


@dataclass(frozen=True)
class Submission:
    """One run as a Slurm job.

    Attributes:
        task: the command that its ranks run.
        config: file of the run.
        overrides: laid over it.
        nodes: how many.
        gpus_per_node: GPUs asked for on each; 0 for none.
        ranks_per_node: ranks on each.
        cpus_per_rank: None where the partition's nodes decide.
        seconds: time limit.
        partition, account, qos: as sbatch takes them; None for Slurm's own choice.
        container: image for pyxis; a file's path is absolute.
        mounts: what the container sees besides checkout and working folder, SRC:DST[,SRC:DST].
        launcher: what starts the ranks.
        chain: jobs, each of which follows where the ones before it did not finish the run.
        further: more options of sbatch's, each as one word.
    """

    task: Task
    config: Path
    overrides: tuple[str, ...]
    nodes: int
    gpus_per_node: int
    ranks_per_node: int
    cpus_per_rank: int | None
    seconds: int
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    container: str | None = None
    mounts: str | None = None
    launcher: Launcher = "srun"
    chain: int = 1
    further: tuple[str, ...] = ()

    @property
    def world_size(self) -> int:
        """Ranks of the run."""
        return self.nodes * self.ranks_per_node

    @property
    def lead_seconds(self) -> int:
        """How long before the time limit Slurm is told to send the request to save."""
        return 300

    @property
    def usable_seconds(self) -> int:
        """Of the time limit: until that request comes, which Slurm may send up to a minute early."""
        return self.seconds - self.lead_seconds - 60


def duration(text: str) -> int:
    """Seconds of a time as Slurm takes it: minutes, M:S, H:M:S, D-H, D-H:M or D-H:M:S.

    Raises:
        RequestError: it is none of these, or nothing.
    """
    match = _DURATION.fullmatch(text.strip())
    seconds = 0
    if match is not None:
        parts = [int(part) for part in (match["day_time"] or match["time"]).split(":")]
        if match["days"] is not None:
            hours, minutes, rest = [*parts, 0, 0][:3]
        else:
            hours, minutes, rest = {1: [0, *parts, 0], 2: [0, *parts], 3: parts}[len(parts)]
        seconds = ((int(match["days"] or 0) * 24 + hours) * 60 + minutes) * 60 + rest
    if seconds == 0:
        raise RequestError(
            f"--time {text} is refused",
            rule="minutes, H:M:S or D-H:M:S, above 0",
            cure="--time 4:00:00, or --time 1-00:00:00 for a day",
        )
    return seconds


def shown(seconds: float) -> str:
    """A time as Slurm writes it: D-HH:MM:SS without the days where there is none."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{days}-{hours:02}:{minutes:02}:{rest:02}" if days else f"{hours}:{minutes:02}:{rest:02}"


def image(text: str) -> str:
    """A container's image as pyxis takes it: a file by its absolute path, else a name in a registry as it is.

    Raises:
        RequestError: the file is not there.
    """
    if not _IMAGE_FILE.fullmatch(text):
        return text
    path = Path(text).absolute()
    if not path.is_file():
        raise RequestError(
            f"--container {text} is refused",
            rule=f"{path} is not there",
            cure="a .sqsh file that `enroot import` wrote, or a name such as nvcr.io#nvidia/pytorch:25.03-py3",
        )
    return str(path)


def is_image_file(text: str) -> bool:
    """Whether an image is a file, which can be looked for, and not a name in a registry."""
    return _IMAGE_FILE.fullmatch(text) is not None
