"""Calibration of the memory model: what ran, what ran out of memory, and what was read off GPUs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from benchmarks.planner.least_squares import Prior, Vector, fit
from benchmarks.planner.measurements import Measured, Trial
from launch.planner.coefficients import MemoryCoefficients
from launch.planner.memory import fullest_stage

PRIORS = {
    "activation_scale": Prior(1.0, 0.1),
    "score_bytes_fused": Prior(4.0, 0.3),
    "score_bytes_unfused": Prior(10.0, 0.3),
    "unfused_norm": Prior(4.0, 0.3),
    "working_scale": Prior(1.0, 0.4),
    "logits_scale": Prior(1.0, 0.15),
    "fragmentation": Prior(0.05, 0.5),
    "framework_gib": Prior(2.0, 0.3),
    "group_gib": Prior(0.4, 0.5),
    "spread": Prior(0.06, 0.01),
}
"""Expected before any trial was looked at: counted from what autograd keeps, and orders of magnitude."""

READ_ERROR = 0.12
"""Of the logarithm of memory read off a GPU: a snapshot, in whole GB."""


def calibrate_memory(trials: Sequence[Trial], read: Sequence[Measured]) -> MemoryCoefficients:
    """Coefficients under which jobs that ran fit and jobs that did not do not."""
    sides = np.array([1.0 if one.fits else -1.0 for one in trials])
    capacity = np.log([one.job.device.memory_gib for one in trials])
    sizes = Counter((one.family, one.fits) for one in trials)
    weights = np.array([(60 / sizes[one.family, one.fits]) ** 0.25 for one in trials])
    measured = np.log([one.memory_gib or 1.0 for one in read])

    def residuals(values: dict[str, float]) -> Vector:
        known = MemoryCoefficients(**values)
        predicted = np.log([fullest_stage(one.job, known).gib for one in trials])
        margin = sides * (capacity - predicted) / known.spread
        wrong = np.sqrt(2 * np.logaddexp(0.0, -margin)) * weights
        off = np.log([fullest_stage(one.job, known).gib for one in read]) - measured if read else np.zeros(0)
        return np.concatenate([wrong, off / READ_ERROR])

    return MemoryCoefficients(**fit(residuals, PRIORS, robust_from=3.0))
