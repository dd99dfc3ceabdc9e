"""What ranks that are processes on the cores of one machine cost each other, as it was measured there."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Exchanges:
    """One kind of exchange between two ranks, by its bytes and by how long both computed before it.

    The second matters as much as the first: ranks that computed longer are farther apart when they meet, and on cores
    that were asleep or at something else every thread on the way has to be woken.

    Attributes:
        sizes: bytes, ascending.
        intervals: seconds of computing before it, ascending.
        seconds: of each interval, for each size: until both go on.
        work: likewise, seconds of a core that it takes of each rank, its network thread's included.
    """

    sizes: tuple[float, ...]
    intervals: tuple[float, ...]
    seconds: tuple[tuple[float, ...], ...]
    work: tuple[tuple[float, ...], ...]

    def seconds_of(self, size: float, interval: float) -> float:
        """Until both go on."""
        return self._between(self.seconds, size, interval)

    def work_of(self, size: float, interval: float) -> float:
        """Of a core, for each rank; never more than the exchange takes."""
        return min(self._between(self.work, size, interval), self.seconds_of(size, interval))

    def _between(self, table: Sequence[Sequence[float]], size: float, interval: float) -> float:
        by_interval = [_interpolated(self.sizes, row, max(size, self.sizes[0])) for row in table]
        held = min(max(interval, self.intervals[0]), self.intervals[-1])  # nothing is known outside
        return max(0.0, _interpolated(self.intervals, by_interval, held))


@dataclass(frozen=True)
class Host:
    """A machine whose ranks are processes.

    Attributes:
        cores: that they share.
        copies: numbers of processes that compute at once, ascending, the first 1.
        slowdowns: how many times as much of a core's time the same computing takes then: caches and memory are shared,
            and processes that take turns on a core find its caches filled by others.
        all_reduce: of two ranks.
        hop: each of two ranks sends to the other.
        logit_bytes: moved for each logit by the loss, forward and backward.
    """

    cores: int
    copies: tuple[int, ...]
    slowdowns: tuple[float, ...]
    all_reduce: Exchanges
    hop: Exchanges
    logit_bytes: float

    def slowdown(self, ranks: int) -> float:
        """Of so many processes at once."""
        return _interpolated(self.copies, self.slowdowns, min(max(ranks, 1), self.copies[-1]))

    def turns(self, ranks: int) -> float:
        """How many ranks share a core."""
        return max(1.0, ranks / self.cores)


def _interpolated(places: Sequence[float], values: Sequence[float], place: float) -> float:
    """Linear between neighbours, and beyond the last one as before it."""
    if len(places) == 1:
        return values[0]
    right = min(max(1, bisect_right(places, place)), len(places) - 1)
    low, high = places[right - 1], places[right]
    return values[right - 1] + (values[right] - values[right - 1]) * (place - low) / (high - low)
