"""Published measurements as jobs beside what was measured."""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from launch.planner.job import Job
from launch.planner.table import Row, understand

DATA = Path(__file__).parents[1] / "data" / "planner"
MEMORY_IN_NOTE = re.compile(r"\bmem (\d+)GB")

FAMILIES = (
    ("Aleph-Alpha", "Aleph-Alpha 2023"),
    ("bigscience", "BigScience 2022"),
    ("Korthikanti", "Korthikanti 2022"),
    ("mosaicml", "MosaicML llm-foundry"),
    ("Megatron-Bridge", "Megatron-Bridge pages"),
    ("nemo", "NeMo pages"),
)
"""(mark in a row's source, who published it): left out together, because releases of one page repeat each other."""


@dataclass(frozen=True)
class Measured:
    """One row.

    Attributes:
        row: as printed.
        job: as the planner understands it.
        page: the document that printed it.
        family: who published it.
        step_seconds: measured, for the batch of `job`.
        memory_gib: measured on a GPU, None where not printed.
    """

    row: Row
    job: Job
    page: str
    family: str
    step_seconds: float
    memory_gib: float | None

    @property
    def tokens_per_second(self) -> float:
        """Of one GPU."""
        return self.job.tokens_per_step / self.step_seconds / self.job.num_gpus

    @property
    def group(self) -> tuple[str, ...]:
        """Rows between which a planner chooses: the same model, batch and number of the same GPUs, one page."""
        names = ("model", "params_b", "layers", "hidden", "heads", "gpu", "num_gpus", "seq", "gbs", "precision")
        return (self.page, *(self.row[name] for name in names))

    @property
    def name(self) -> str:
        """For a list of misses."""
        row = self.row
        shape = " ".join(f"{name}{row[name]}" for name in ("tp", "pp", "vpp", "cp", "ep", "mbs", "gbs") if row[name])
        return (
            f"{row['model']} {row['seq']} {row['gpu']} x{row['num_gpus']} {shape} {row['precision']} "
            + row["recompute"]
        )


@dataclass(frozen=True)
class Trial:
    """A layout that ran or ran out of memory."""

    row: Row
    job: Job
    family: str
    fits: bool


@cache
def measurements() -> tuple[Measured, ...]:
    """All rows with a measured speed."""
    found = []
    for row in _rows("published_training_configs.csv"):
        job = understand(row).job
        seconds = _step_seconds(row, job)
        if seconds is not None:
            memory = MEMORY_IN_NOTE.search(row["note"])
            found.append(
                Measured(row, job, page_of(row), family_of(row), seconds, float(memory.group(1)) if memory else None)
            )
    return tuple(found)


@cache
def trials() -> tuple[Trial, ...]:
    """Sweeps that print what ran and what ran out of memory: Aleph-Alpha's and BigScience's."""
    swept = ("Aleph-Alpha 2023", "BigScience 2022")
    ran = [Trial(one.row, one.job, one.family, fits=True) for one in measurements() if one.family in swept]
    failed = [
        Trial(row, understand(row).job, family_of(row), fits=False)
        for row in _rows("published_oom_cases.csv")
        if row["outcome"] in ("OOM", "OOM Error")
    ]
    return (*ran, *failed)


def page_of(row: Row) -> str:
    """The document without what tells its rows apart."""
    return re.sub(r" trial \d+$", "", row["source"])


def family_of(row: Row) -> str:
    """Who published a row."""
    return next((name for mark, name in FAMILIES if mark.lower() in row["source"].lower()), page_of(row))


def _step_seconds(row: Row, job: Job) -> float | None:
    if row["step_time_s"]:
        return float(row["step_time_s"])
    if row["tokens_per_s_per_gpu"]:
        return job.tokens_per_step / float(row["tokens_per_s_per_gpu"]) / job.num_gpus
    return None


def _rows(name: str) -> list[Row]:
    with open(DATA / name, newline="") as file:
        return list(csv.DictReader(file))
