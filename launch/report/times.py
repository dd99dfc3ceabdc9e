"""Where the wall clock of a run went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from training.survival.goodput import goodput

MEANINGS = {
    "productive": "in steps that stayed",
    "checkpoint": "the run stood still to save",
    "evaluation": "on held-out data",
    "restart": "between lives, and from a life's start to its first step",
    "lost": "in steps that had to be done again, and in hangs",
    "other": "what no event explains",
}


@dataclass(frozen=True)
class Times:
    """Seconds by what they went into, in the order of MEANINGS."""

    seconds: Mapping[str, float]
    lives: int

    @property
    def wall(self) -> float:
        """All of it."""
        return sum(self.seconds.values())

    @property
    def goodput(self) -> float:
        """Productive time over all of it."""
        return self.seconds["productive"] / self.wall if self.wall else 0.0


def times(events: Sequence[Mapping[str, Any]]) -> Times | None:
    """Of a run's events; None where there are none."""
    if not events:
        return None
    found = goodput(events)
    return Times({name: float(getattr(found, name)) for name in MEANINGS}, found.lives)
