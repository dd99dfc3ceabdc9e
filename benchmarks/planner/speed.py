"""Calibration of the step-time model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np

from benchmarks.planner.least_squares import Prior, Vector, fit
from benchmarks.planner.measurements import Measured, measurements
from launch.planner.coefficients import TimeCoefficients
from launch.planner.step_time import step_time

PRIORS = {
    "efficiency_bf16_ampere": Prior(0.80, 0.12),
    "efficiency_bf16_hopper": Prior(0.70, 0.12),
    "efficiency_bf16_blackwell": Prior(0.75, 0.12),
    "efficiency_fp8_hopper": Prior(0.60, 0.15),
    "efficiency_fp8_blackwell": Prior(0.65, 0.15),
    "efficiency_fp4": Prior(0.50, 0.2),
    "ultra": Prior(1.1, 0.1),
    "efficiency_grouped": Prior(0.80, 0.2),
    "efficiency_attention_ampere": Prior(0.50, 0.2),
    "efficiency_attention_hopper": Prior(0.45, 0.2),
    "efficiency_attention_blackwell": Prior(0.45, 0.2),
    "slowdown_flash1": Prior(1.5, 0.2),
    "misaligned_heads": Prior(2.0, 0.5),
    "small_side": Prior(100.0, 0.7),
    "score_bytes_fused": Prior(20.0, 0.2),
    "score_bytes_unfused": Prior(60.0, 0.3),
    "element_bytes": Prior(2.0, 0.3),
    "unfused_norm": Prior(4.0, 0.3),
    "unfused_elements": Prior(2.0, 0.3),
    "fp8_cast_bytes": Prior(8.0, 0.5),
    "efficiency_memory": Prior(0.80, 0.1),
    "efficiency_scale_up": Prior(0.70, 0.2),
    "efficiency_scale_out": Prior(0.75, 0.2),
    "exposed_tensor": Prior(1.0, 0.1),
    "exposed_tensor_plain": Prior(1.5, 0.3),
    "exposed_tensor_overlapped": Prior(0.5, 0.4),
    "collective_seconds": Prior(4e-5, 0.7),
    "exposed_context": Prior(0.3, 0.5),
    "exposed_pipeline": Prior(0.7, 0.5),
    "exposed_data": Prior(0.2, 0.5),
    "exposed_sharded": Prior(0.2, 0.5),
    "exposed_expert": Prior(0.7, 0.4),
    "layer_seconds": Prior(6e-4, 0.5),
    "expert_layer_seconds": Prior(4e-4, 0.7),
    "local_expert_seconds": Prior(3e-5, 0.7),
    "older_software": Prior(1.3, 0.3),
    "routing_bytes": Prior(24.0, 0.5),
    "expert_imbalance": Prior(1.1, 0.05),
    "state_elements": Prior(63.0, 0.3),
    "step_seconds": Prior(0.05, 0.7),
    "jitter": Prior(0.005, 0.3),
}
"""Expected before any of the rows was looked at: microbenchmarks of such devices that are common knowledge, and orders
of magnitude. Wide where less is known. Counted since, when they came to stand for something else: `layer_seconds`, what
a host takes for a layer's seventy launches; `state_elements`, what the kernels of arXiv 2405.21060 read and write."""

EXPECTED_ERROR = 0.16
"""Of the logarithm: what programs that were left out are off by. More than rows scatter by, since those of one program
err together: a smaller one would let the programs that were measured bend what holds for others."""


def calibrate(rows: Sequence[Measured]) -> TimeCoefficients:
    """Coefficients from `rows`, each of which counts alike."""
    measured = np.log([one.step_seconds for one in rows])
    places = {id(one): place for place, one in enumerate(measurements())}
    chosen = [places[id(one)] for one in rows]

    def residuals(values: dict[str, float]) -> Vector:
        predicted = _log_seconds(tuple(values[name] for name in PRIORS))[chosen]
        return np.asarray((predicted - measured) / EXPECTED_ERROR)

    return TimeCoefficients(**fit(residuals, PRIORS))


@cache
def _log_seconds(values: tuple[float, ...]) -> Vector:
    """Of all measurements: fits with some left out start from the same values."""
    known = TimeCoefficients(**dict(zip(PRIORS, values, strict=True)))
    return np.log([step_time(one.job, known).total for one in measurements()])
