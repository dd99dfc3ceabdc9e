"""The shipped coefficients on the published measurements: what must not get worse unseen."""

from __future__ import annotations

from dataclasses import fields

import numpy as np

from benchmarks.planner.measurements import measurements, trials
from benchmarks.planner.room import PRIORS as MEMORY_PRIORS
from benchmarks.planner.speed import PRIORS as TIME_PRIORS
from benchmarks.planner.validation import ranking
from launch.planner.coefficients import MemoryCoefficients, TimeCoefficients, memory_coefficients, time_coefficients
from launch.planner.memory import fits, fullest_stage
from launch.planner.step_time import step_time


def test_speeds_of_all_measurements() -> None:
    speeds = [step_time(row.job).tokens_per_second(row.job) for row in measurements()]
    pairs = zip(measurements(), speeds, strict=True)
    errors = np.abs([speed / row.tokens_per_second - 1 for row, speed in pairs])
    assert len(errors) == 751
    assert np.median(errors) < 0.06
    assert np.quantile(errors, 0.9) < 0.25
    order = ranking(speeds)
    assert order.spearman > 0.85
    assert order.regret < 0.03


def test_trials_of_memory() -> None:
    judged = [(trial.fits, fits(trial.job, fullest_stage(trial.job))) for trial in trials()]
    caught = sum(not ran and not held for ran, held in judged)
    assert caught / sum(not held for _, held in judged) > 0.94
    assert caught / sum(not ran for ran, _ in judged) > 0.94


def test_every_coefficient_has_a_prior_and_lies_near_it() -> None:
    """One that left its prior by far is a sign that the formula behind it is wrong."""
    for kind, values, priors in (
        (TimeCoefficients, time_coefficients(), TIME_PRIORS),
        (MemoryCoefficients, memory_coefficients(), MEMORY_PRIORS),
    ):
        assert {field.name for field in fields(kind)} == set(priors)
        for name, prior in priors.items():
            assert abs(np.log(getattr(values, name) / prior.value)) < 8 * prior.spread, name
