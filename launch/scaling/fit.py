"""What the times of several sizes say: how much is computing, how much is replicas' communication, and the next size.

A step takes  t = a w + c x + l  seconds. w is a rank's share of the work (1 in a weak series, smallest/size in a strong
one); x = (d - 1) / d is what a ring of d replicas sends of each byte that it reduces (Patarasuk & Yuan 2009). So a is
computing at the smallest size, and c the time that all bytes of gradients and weights take over the link once. l is not
fitted but measured at each size: how often replicas exchange in a step, times what an all-reduce of few bytes takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

SINGULAR = 1e-3
"""Columns whose angle has a smaller squared sine are too alike to be told apart."""


@dataclass(frozen=True)
class Point:
    """One size as it was measured.

    Attributes:
        size: nodes or ranks.
        work: of a rank, over that at the smallest size.
        exchanged: (d - 1) / d of its d replicas.
        seconds: of a step.
        latency: of them, what its exchanges take whatever their bytes; 0 where that was not measured.
    """

    size: int
    work: float
    exchanged: float
    seconds: float
    latency: float = 0.0


@dataclass(frozen=True)
class Fit:
    """Seconds of a step by what they go into; neither is below 0."""

    computing: float
    link: float

    def seconds(self, work: float, exchanged: float, latency: float) -> float:
        """A step of another size."""
        return self.computing * work + self.link * exchanged + latency

    def share_of_link(self, point: Point) -> float:
        """Of a step at `point`."""
        communicating = self.link * point.exchanged + point.latency
        return communicating / self.seconds(point.work, point.exchanged, point.latency)


def fit(points: Sequence[Point]) -> Fit | None:
    """Least squares of relative errors, no part below 0; None where the sizes cannot tell the two parts apart."""
    rows = [(point.work / point.seconds, point.exchanged / point.seconds) for point in points]
    aa, cc = sum(a * a for a, _ in rows), sum(c * c for _, c in rows)
    ac = sum(a * c for a, c in rows)
    if len(points) < 2 or aa * cc == 0 or aa * cc - ac * ac < SINGULAR * aa * cc:
        return None
    left = [1 - point.latency / point.seconds for point in points]
    a_sum = sum(a * share for (a, _), share in zip(rows, left, strict=True))
    c_sum = sum(c * share for (_, c), share in zip(rows, left, strict=True))
    determinant = aa * cc - ac * ac
    computing = (a_sum * cc - c_sum * ac) / determinant
    link = (aa * c_sum - ac * a_sum) / determinant
    if link < 0:
        return Fit(max(0.0, a_sum / aa), 0.0)
    if computing < 0:
        return Fit(0.0, max(0.0, c_sum / cc))
    return Fit(computing, link)
