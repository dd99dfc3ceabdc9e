"""Where a rank is in its run, and where its time went: written by the main thread, read by the watchdog's."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple, TypeVar

OfTraining = Literal[
    "start", "load", "data", "forward and backward", "optimizer", "agreement", "evaluation", "save", "end"
]
OfPpo = Literal["sampling", "judging", "learning", "exchange"]
Phase = OfTraining | OfPpo
SLOW: frozenset[Phase] = frozenset({"start", "load", "save", "end"})
"""Phases that take as long as the disk does."""
PRODUCTIVE: frozenset[Phase] = frozenset(
    {"data", "forward and backward", "optimizer", "agreement", "sampling", "judging", "learning", "exchange"}
)
"""Phases of a training step; the last four are those of an iteration of PPO."""

Item = TypeVar("Item")


class Position(NamedTuple):
    """Where the main thread was when it last said so.

    Attributes:
        step: the one at work, counted from 1; 0 before the first.
        phase: of the step.
        marks: how often it has said so; every one is progress.
        since: time of the last one, on the pulse's clock.
    """

    step: int
    phase: Phase
    marks: int
    since: float


class Pulse:
    """`mark` is cheap enough for every micro-batch: no lock, no file."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.position = Position(0, "start", 0, clock())
        self._seconds: dict[str, float] = {}

    def mark(self, phase: Phase, step: int | None = None) -> None:
        """The main thread begins `phase` (of `step`, where that is another)."""
        before, now = self.position, self.clock()
        self._seconds[before.phase] = self._seconds.get(before.phase, 0.0) + now - before.since
        # One assignment: another thread sees the old position or the new one.
        self.position = Position(before.step if step is None else step, phase, before.marks + 1, now)

    def gets_on(self) -> None:
        """The main thread gets on in the phase that it is in."""
        self.mark(self.position.phase)

    @contextmanager
    def during(self, phase: Phase) -> Iterator[None]:
        """`phase` inside the block, the phase before it afterwards."""
        before = self.position.phase
        self.mark(phase)
        yield
        self.mark(before)

    def reading(self, items: Iterator[Item]) -> Iterator[Item]:
        """`items`; the time to get each one is the phase "data"."""
        while True:
            with self.during("data"):
                item = next(items, None)
            if item is None:
                return
            yield item

    def seconds(self) -> dict[str, float]:
        """Seconds in each phase since the process began to count, the current one included. Main thread only."""
        position = self.position
        spent = dict(self._seconds)
        spent[position.phase] = spent.get(position.phase, 0.0) + self.clock() - position.since
        return spent
