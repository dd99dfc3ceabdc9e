"""Curves as inline SVG: no script, no font and no colour of its own; the page's style sheet has those."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 480, 250
LEFT, RIGHT, TOP, BOTTOM = 66, 12, 12, 30
MOST_POINTS = 480
"""Of a curve; of more, each bucket's lowest and highest are drawn, so that no spike is lost."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Curve:
    """One line of a chart. `number` chooses its colour; `dots` marks each point."""

    name: str
    points: tuple[Point, ...]
    number: int = 1
    dots: bool = False


@dataclass(frozen=True)
class Mark:
    """A vertical line at a step: something happened there."""

    x: float
    text: str


def line_chart(title: str, curves: Sequence[Curve], marks: Sequence[Mark] = (), *, from_zero: bool = False) -> str:
    """An <svg> of curves over steps. Points that are not finite are gaps.

    Args:
        title: what a screen reader says.
        curves: at least one of them with a finite point.
        marks: drawn behind the curves.
        from_zero: whether the vertical axis begins at 0.
    """
    finite = [point for curve in curves for point in curve.points if math.isfinite(point[1])]
    xs, ys = [x for x, _ in finite], [y for _, y in finite]
    horizontal = Axis.over(min(xs), max(xs), whole=True)
    vertical = Axis.over(0.0 if from_zero else min(ys), max(ys))
    place = _Place(horizontal, vertical)
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    parts += _grid(place)
    for mark in marks:
        if horizontal.low <= mark.x <= horizontal.high:
            x = place.x(mark.x)
            parts.append(
                f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}">'
                f"<title>{escape(mark.text)}</title></line>"
            )
    for curve in curves:
        parts += _line(curve, place)
    return "".join([*parts, "</svg>"])


@dataclass(frozen=True)
class Axis:
    """A range with round ends, and the round numbers in it."""

    low: float
    high: float
    ticks: tuple[float, ...]

    @classmethod
    def over(cls, low: float, high: float, *, whole: bool = False) -> Axis:
        """An axis that holds `low` to `high`; with `whole`, of whole numbers and no wider than that."""
        if high <= low:
            room = 1.0 if whole else abs(low) * 0.1 or 1.0
            low, high = low - room, high + room
        step = _round_step((high - low) / 4)
        if whole:
            step = max(1.0, step)
            first = math.ceil(low / step)
            ticks = tuple(step * number for number in range(first, math.floor(high / step) + 1))
            return cls(low, high, ticks)
        first, last = math.floor(low / step), math.ceil(high / step)
        ticks = tuple(step * number for number in range(first, last + 1))
        return cls(ticks[0], ticks[-1], ticks)

    def share(self, value: float) -> float:
        """0 at the low end, 1 at the high one."""
        return (value - self.low) / (self.high - self.low)


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * (1 - 1e-9))


@dataclass(frozen=True)
class _Place:
    horizontal: Axis
    vertical: Axis

    def x(self, value: float) -> float:
        return LEFT + self.horizontal.share(value) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - self.vertical.share(value) * (HEIGHT - TOP - BOTTOM)


def _grid(place: _Place) -> list[str]:
    parts = []
    for tick in place.vertical.ticks:
        y = place.y(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{short(tick)}</text>')
    for tick in place.horizontal.ticks:
        parts.append(
            f'<text x="{place.x(tick):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{short(tick)}</text>'
        )
    return parts


def _line(curve: Curve, place: _Place) -> list[str]:
    drawn = [(place.x(x), place.y(y)) for x, y in thinned(curve.points)]
    path, pen_down = [], False
    for x, y in drawn:
        if not math.isfinite(y):
            pen_down = False
            continue
        path.append(f"{'L' if pen_down else 'M'}{x:.1f} {y:.1f}")
        pen_down = True
    name = escape(curve.name)
    parts = [f'<path class="curve c{curve.number}" d="{"".join(path)}"><title>{name}</title></path>']
    if curve.dots or len(path) == 1:
        parts += [
            f'<circle class="dot c{curve.number}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>'
            for x, y in drawn
            if math.isfinite(y)
        ]
    return parts


def thinned(points: Sequence[Point]) -> list[Point]:
    """At most MOST_POINTS of them or so: of every bucket the lowest and the highest, and any gap."""
    if len(points) <= MOST_POINTS:
        return list(points)
    size = math.ceil(len(points) / (MOST_POINTS // 2))
    kept: list[Point] = []
    for start in range(0, len(points), size):
        bucket = points[start : start + size]
        finite = [point for point in bucket if math.isfinite(point[1])]
        ends = {min(finite, key=_height), max(finite, key=_height)} if finite else set()
        gap = {next(point for point in bucket if not math.isfinite(point[1]))} if len(finite) < len(bucket) else set()
        kept += sorted(ends | gap)
    return kept


def _height(point: Point) -> float:
    return point[1]


def short(value: float) -> str:
    """A number as short as it can be read: 12k, 0.25, 3e-05."""
    size = abs(value)
    for power, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= power:
            return f"{value / power:.4g}{letter}"
    return f"{value:.4g}"
