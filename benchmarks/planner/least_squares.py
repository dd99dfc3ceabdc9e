"""Robust least squares with priors, in the logarithm of positive coefficients (Levenberg-Marquardt on numpy)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Prior:
    """What a coefficient is expected to be: `value`, within a factor of about exp(`spread`)."""

    value: float
    spread: float


def fit(
    residuals: Callable[[dict[str, float]], Vector],
    priors: dict[str, Prior],
    *,
    robust_from: float = 1.0,
    rounds: int = 25,
) -> dict[str, float]:
    """The coefficients with the least robust sum of squares, priors included.

    Args:
        residuals: of all observations, in units of their expected error.
        priors: of every coefficient.
        robust_from: residuals beyond this weigh less (Huber).
        rounds: steps at most.
    """
    names = list(priors)
    centre = np.log([priors[name].value for name in names])
    spread = np.array([priors[name].spread for name in names])

    def at(point: Vector) -> Vector:
        return residuals({name: float(np.exp(value)) for name, value in zip(names, point, strict=True)})

    def cost(point: Vector, found: Vector) -> float:
        size = np.abs(found)
        huber = np.where(size <= robust_from, found**2, 2 * robust_from * size - robust_from**2)
        return float(huber.sum() + (((point - centre) / spread) ** 2).sum())

    point, damping = centre.copy(), 1e-2
    found = at(point)
    best = cost(point, found)
    for _ in range(rounds):
        step = 1e-3
        jacobian = np.stack([(at(point + step * unit) - found) / step for unit in np.eye(len(names))], axis=1)
        weight = np.minimum(1.0, robust_from / np.maximum(np.abs(found), 1e-12))
        normal = jacobian.T @ (jacobian * weight[:, None]) + np.diag(spread**-2.0)
        gradient = jacobian.T @ (weight * found) + (point - centre) / spread**2
        improved = False
        for _ in range(8):
            move = np.linalg.solve(normal + damping * np.diag(np.diag(normal)), -gradient)
            candidate = point + np.clip(move, -0.7, 0.7)
            tried = at(candidate)
            new = cost(candidate, tried)
            if new < best:
                improved = best - new > 1e-4 * best
                point, found, best, damping = candidate, tried, new, damping / 4
                break
            damping *= 4
        if not improved:
            break
    return {name: float(np.exp(value)) for name, value in zip(names, point, strict=True)}
