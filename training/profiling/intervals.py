"""Stretches of time, added up and taken apart."""

from __future__ import annotations

from collections.abc import Iterable

Interval = tuple[float, float]


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same times as stretches that do not touch, in order."""
    joined: list[Interval] = []
    for begin, end in sorted(intervals):
        if joined and begin <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end))
        elif end > begin:
            joined.append((begin, end))
    return joined


def length(intervals: Iterable[Interval]) -> float:
    """Of stretches that do not touch."""
    return sum(end - begin for begin, end in intervals)


def without(intervals: Iterable[Interval], others: Iterable[Interval]) -> list[Interval]:
    """What of `intervals` is in none of `others`."""
    left: list[Interval] = []
    taken = union(others)
    place = 0
    for begin, end in union(intervals):
        while place < len(taken) and taken[place][1] <= begin:
            place += 1
        at, reached = place, begin
        while at < len(taken) and taken[at][0] < end:
            if taken[at][0] > reached:
                left.append((reached, taken[at][0]))
            reached = max(reached, taken[at][1])
            at += 1
        if reached < end:
            left.append((reached, end))
    return left
