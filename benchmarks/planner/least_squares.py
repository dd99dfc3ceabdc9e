"""Robust least squares with priors, in the logarithm of positive coefficients (Levenberg-Marquardt on numpy)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float64]


STEP = 1e-3
"""In the logarithm, for slopes."""

ENOUGH = 1e-3
"""A round that gains less of the cost calls for new slopes, and with new ones ends the fit."""


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

    def slopes(point: Vector, found: Vector) -> npt.NDArray[np.float64]:
        return np.stack([(at(point + STEP * unit) - found) / STEP for unit in np.eye(len(names))], axis=1)

    point, damping = centre.copy(), 1e-2
    found = at(point)
    best, jacobian, fresh = cost(point, found), slopes(point, found), True
    for _ in range(rounds):
        weight = np.minimum(1.0, robust_from / np.maximum(np.abs(found), 1e-12))
        normal = jacobian.T @ (jacobian * weight[:, None]) + np.diag(spread**-2.0)
        gradient = jacobian.T @ (weight * found) + (point - centre) / spread**2
        gained = 0.0
        for _ in range(8):
            move = np.clip(np.linalg.solve(normal + damping * np.diag(np.diag(normal)), -gradient), -0.7, 0.7)
            tried = at(point + move)
            new = cost(point + move, tried)
            if new < best:
                # Broyden's update: the slopes along the way that was gone are known now, for nothing.
                jacobian = jacobian + np.outer((tried - found - jacobian @ move) / (move @ move), move)
                gained, point, found, best, damping = (best - new) / best, point + move, tried, new, damping / 4
                break
            damping *= 4
        if gained > ENOUGH:
            fresh = False
            continue
        if fresh:
            break
        jacobian, fresh, damping = slopes(point, found), True, 1e-2
    return {name: float(np.exp(value)) for name, value in zip(names, point, strict=True)}
