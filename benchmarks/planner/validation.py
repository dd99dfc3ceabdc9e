"""The planner's error on what its coefficients have not seen."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

import numpy as np

from benchmarks.planner.measurements import Measured, Trial, measurements, trials
from benchmarks.planner.room import calibrate_memory
from benchmarks.planner.speed import calibrate
from launch.planner.coefficients import TimeCoefficients
from launch.planner.memory import fullest_stage
from launch.planner.step_time import step_time

PROCESSES = 2
SMALLEST_GROUP = 4
"""Fewer rows leave nothing to rank."""


@dataclass(frozen=True)
class Errors:
    """Of tokens/s/GPU, relative to what was measured."""

    rows: int
    median: float
    ninetieth: float
    bias: float
    """Median of the logarithm of predicted over measured."""

    @classmethod
    def of(cls, pairs: Sequence[tuple[float, float]]) -> Errors:
        """Of (predicted, measured) speeds."""
        logs = np.log([predicted / measured for predicted, measured in pairs])
        size = np.abs(np.expm1(logs))
        return cls(len(pairs), float(np.median(size)), float(np.quantile(size, 0.9)), float(np.median(logs)))


@dataclass(frozen=True)
class Ranking:
    """Within groups of rows between which one chooses.

    Attributes:
        groups: how many.
        spearman: median rank correlation.
        regret: median share of the best measured speed that the predicted first choice loses.
        mean_regret: the mean of it.
    """

    groups: int
    spearman: float
    regret: float
    mean_regret: float


@dataclass(frozen=True)
class Classified:
    """Jobs held to run or to run out of memory."""

    rows: int
    precision: float
    recall: float
    missed: tuple[Trial, ...]
    false_alarms: tuple[Trial, ...]


def page(row: Measured) -> str:
    """The document that a row is from; sheets of one paper are one."""
    return row.family if row.family == "Aleph-Alpha 2023" else row.page


def family(row: Measured) -> str:
    """Who published a row."""
    return row.family


def size_class(row: Measured) -> str:
    """Parameters, to the nearest power of two billions."""
    power = round(math.log2(row.job.architecture.parameters() / 1e9))
    return f"about {2**power:g}B" if power >= 0 else "below 1B"


KINDS: dict[str, Callable[[Measured], str]] = {"source": page, "publisher": family, "model size": size_class}


def left_out(kind: str) -> list[float]:
    """Predicted tokens/s/GPU of every row by coefficients from the rows of all other parts."""
    rows, key = measurements(), KINDS[kind]
    calibrate(rows)  # the processes that follow find its first slopes done
    parts = sorted({key(row) for row in rows})
    with ProcessPoolExecutor(PROCESSES, mp_context=get_context("fork")) as pool:
        found = list(pool.map(_without, [kind] * len(parts), parts))
    by_part = dict(zip(parts, found, strict=True))
    return [step_time(row.job, by_part[key(row)]).tokens_per_second(row.job) for row in rows]


def _without(kind: str, part: str) -> TimeCoefficients:
    return calibrate([row for row in measurements() if KINDS[kind](row) != part])


def errors_by(key: Callable[[Measured], Hashable], predicted: Sequence[float]) -> dict[Hashable, Errors]:
    """Errors of each part, and of all under "all"."""
    parts: dict[Hashable, list[tuple[float, float]]] = defaultdict(list)
    for row, speed in zip(measurements(), predicted, strict=True):
        parts[key(row)].append((speed, row.tokens_per_second))
        parts["all"].append((speed, row.tokens_per_second))
    return {part: Errors.of(pairs) for part, pairs in parts.items()}


def ranking(predicted: Sequence[float], which: Callable[[Measured], bool] = lambda _: True) -> Ranking:
    """How well rows of a group are ordered."""
    groups: dict[tuple[str, ...], list[tuple[float, float]]] = defaultdict(list)
    for row, speed in zip(measurements(), predicted, strict=True):
        if which(row):
            groups[row.group].append((speed, row.tokens_per_second))
    large = [pairs for pairs in groups.values() if len(pairs) >= SMALLEST_GROUP]
    if not large:
        return Ranking(0, math.nan, math.nan, math.nan)
    regrets = []
    for pairs in large:
        chosen = max(pairs, key=lambda pair: pair[0])[1]
        regrets.append(1 - chosen / max(measured for _, measured in pairs))
    correlations = [_spearman(pairs) for pairs in large]
    return Ranking(len(large), float(np.median(correlations)), float(np.median(regrets)), float(np.mean(regrets)))


def _spearman(pairs: Sequence[tuple[float, float]]) -> float:
    first, second = (_ranks(values) for values in zip(*pairs, strict=True))
    return float(np.corrcoef(first, second)[0, 1])


def _ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 0, ties shared."""
    array = np.asarray(values)
    return [float((array < value).sum() + ((array == value).sum() - 1) / 2) for value in values]


def memory_size(trial: Trial) -> str:
    """What is left out together: a model of the sweep, or all of BigScience's sizes, which are one."""
    return trial.job.architecture.name if trial.family == "Aleph-Alpha 2023" else "about 180B (BigScience)"


def out_of_memory() -> dict[str, Classified]:
    """Precision and recall of each size by coefficients from the others, and of all together."""
    read = [row for row in measurements() if row.memory_gib is not None]
    found: dict[str, Classified] = {}
    everything: list[tuple[Trial, bool]] = []
    for size in sorted({memory_size(trial) for trial in trials()}):
        known = calibrate_memory(
            [trial for trial in trials() if memory_size(trial) != size], [] if "BigScience" in size else read
        )
        judged = [
            (trial, fullest_stage(trial.job, known).gib <= trial.job.device.memory_gib)
            for trial in trials()
            if memory_size(trial) == size
        ]
        found[size] = _classified(judged)
        everything += judged
    found["all"] = _classified(everything)
    return found


def _classified(judged: Sequence[tuple[Trial, bool]]) -> Classified:
    caught = sum(not fits and not trial.fits for trial, fits in judged)
    missed = tuple(trial for trial, fits in judged if fits and not trial.fits)
    alarms = tuple(trial for trial, fits in judged if not fits and trial.fits)
    return Classified(
        len(judged), caught / max(1, caught + len(alarms)), caught / max(1, caught + len(missed)), missed, alarms
    )
