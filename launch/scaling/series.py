"""A series of sizes: what each one runs, where it writes, and whether it is done."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from foundation.errors import RequestError
from foundation.files import write_text
from launch.config import RunConfig
from launch.overrides import setting
from launch.run_records import METRICS, read_lines, read_object

Mode = Literal["weak", "strong"]
Unit = Literal["nodes", "ranks"]
FILE = "series.json"

RECORDED = 2
"""Steps after the measured ones: one whose pipeline's timeline is recorded, one under torch's profiler."""

MEASURED_ALONE = (
    "checkpoint.interval=null",
    "checkpoint.keep_every=null",
    "evaluation.interval=null",
    "guards.on_nan=stop",
    "guards.on_spike=warn",
    "schedule.kind=constant",
    "schedule.warmup_steps=0",
    "schedule.decay_steps=null",
    "schedule.wsd_decay_steps=null",
)
"""Settings of every size: nothing but steps is measured, and a short run has no schedule."""


@dataclass(frozen=True)
class Series:
    """Sizes of one run.

    Attributes:
        mode: weak: the batch grows with the size. strong: it stays.
        unit: what `sizes` count.
        sizes: ascending.
        ranks_each: ranks of one unit.
        config: file of the run, absolute.
        overrides: laid over it.
        steps: measured, after `warm_up` others.
        config_sha256: of the file when the series began; empty where that is not known.
    """

    mode: Mode
    unit: Unit
    sizes: tuple[int, ...]
    ranks_each: int
    config: str
    overrides: tuple[str, ...]
    steps: int
    warm_up: int
    config_sha256: str = ""

    def ranks(self, size: int) -> int:
        """Of a size."""
        return size * self.ranks_each

    @property
    def last_step(self) -> int:
        """Of a size's run."""
        return self.warm_up + self.steps + RECORDED

    def run_folder(self, folder: Path, size: int) -> Path:
        """Of a size."""
        return folder / f"{self.unit}-{size:04d}"

    def overrides_of(self, size: int, config: RunConfig, folder: Path) -> list[str]:
        """What a size lays over the configuration, which is that of the smallest one.

        Raises:
            RequestError: the grid of one replica does not fill the size's ranks.
        """
        batch = config.training.global_batch_size
        parallel = config.parallel
        replica = (
            parallel.tensor_model_parallel_size * parallel.context_parallel_size * parallel.pipeline_model_parallel_size
        )
        ranks = self.ranks(size)
        if ranks % replica:
            raise RequestError(
                f"{size} {self.unit} are refused",
                rule=f"{ranks} ranks are a multiple of the {replica} of one replica",
                cure=f"sizes of {replica} ranks and multiples of it, or a smaller layout",
            )
        if self.mode == "weak":
            if batch * size % self.sizes[0]:
                raise RequestError(
                    f"{size} {self.unit} are refused",
                    rule=f"training.global_batch_size {batch} x {size} / {self.sizes[0]} is a whole number",
                    cure="sizes that are multiples of the smallest",
                )
            batch = batch * size // self.sizes[0]
        return [
            *self.overrides,
            *MEASURED_ALONE,
            setting("run.folder", str(self.run_folder(folder, size))),
            f"training.train_steps={self.last_step}",
            f"profile.timeline={self.last_step - 1}",
            f"profile.steps={self.last_step}",
            "profile.ranks=0",
            "profile.network=true",
            f"training.global_batch_size={batch}",
            f"parallel.data_parallel_size={ranks // replica}",
        ]

    def done(self, folder: Path, size: int) -> bool:
        """Whether every step of a size has been measured."""
        done = {line["step"] for line in self._lines(folder, size)}
        return all(step in done for step in range(self.warm_up + 1, self.last_step + 1))

    def measured(self, folder: Path, size: int) -> list[dict[str, Any]]:
        """The lines of the steps to measure. Of a step that a second start repeated, the newest."""
        newest = {line["step"]: line for line in self._lines(folder, size)}
        return [newest[step] for step in range(self.warm_up + 1, self.warm_up + self.steps + 1)]

    def _lines(self, folder: Path, size: int) -> list[dict[str, Any]]:
        return read_lines(self.run_folder(folder, size) / METRICS, ("step", "step_seconds"))

    def refuse_edited(self) -> None:
        """Sizes of different configurations are not compared.

        Raises:
            RequestError: the file is not the one that the series began with.
        """
        file = Path(self.config)
        if self.config_sha256 and file.is_file() and sha256_of(file) != self.config_sha256:
            raise RequestError(
                f"{self.config} has changed since the series began",
                rule="all sizes have one configuration",
                cure="put it back as it was, or begin another series by another --out",
            )

    def refuse_another(self, folder: Path) -> None:
        """A folder holds one series; other sizes may join it, but for a smaller one, which changes what is compared.

        Raises:
            RequestError: it holds another one.
        """
        if not (folder / FILE).is_file():
            return
        other = read_series(folder)
        other.refuse_edited()
        if replace(other, sizes=self.sizes) != self or other.sizes[0] != self.sizes[0]:
            raise RequestError(
                f"{folder} holds another series",
                rule="a series that goes on has the same configuration, mode, steps and smallest size",
                cure="another --out, or the command as it was",
            )

    def begin(self, folder: Path) -> None:
        """Write the series down."""
        write_text(folder / FILE, json.dumps(asdict(self), indent=2) + "\n")


def read_series(folder: Path) -> Series:
    """The series that was begun in `folder`.

    Raises:
        RequestError: there is none, or it is damaged.
    """
    file = folder / FILE
    if not file.is_file():
        raise RequestError(
            f"{folder} holds no series",
            rule=f"`orthant scale` writes {FILE} there",
            cure="the --out of an `orthant scale` that was started",
        )
    names = [field.name for field in fields(Series)]
    read = read_object(file, names)
    values: dict[str, Any] = {name: read[name] for name in names}
    values |= {name: tuple(values[name]) for name in ("sizes", "overrides")}
    return Series(**values)


def sha256_of(config: Path) -> str:
    """Of a configuration's file."""
    return hashlib.sha256(config.read_bytes()).hexdigest()


def parse_sizes(text: str, option: str) -> tuple[int, ...]:
    """`1,2,4` as ascending sizes.

    Raises:
        RequestError: it is no such list.
    """
    words = [word.strip() for word in text.split(",")]
    sizes = [int(word) for word in words if word.isdecimal() and len(word) < 10]
    if len(sizes) < len(words) or 0 in sizes or len(set(sizes)) < len(sizes):
        raise RequestError(
            f"{option} {text} is refused", rule="different numbers above 0, separated by commas", cure=f"{option} 1,2,4"
        )
    return tuple(sorted(sizes))
