"""When each role was at work."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from training.survival.pulse import Phase, Pulse

PHASES: dict[str, Phase] = {
    "refit": "exchange",
    "sample": "sampling",
    "judge": "judging",
    "look": "learning",
    "learn": "learning",
}
"""What a role does, for the watchdog; between these a station waits for others."""


class Timeline:
    """Spans of work of the roles at one rank.

    Args:
        path: a .jsonl that takes one line a span; None: only sums are kept.
        pulse: told what this rank does.
    """

    def __init__(self, path: Path | None = None, pulse: Pulse | None = None) -> None:
        self._path, self._lines = path, list[str]()
        self._seconds: dict[str, float] = defaultdict(float)
        self._pulse, self._iteration = pulse or Pulse(), 0

    @property
    def iteration(self) -> int:
        """The one at work, from 0."""
        return self._iteration

    @iteration.setter
    def iteration(self, number: int) -> None:
        self._iteration = number
        self._pulse.mark("exchange", number + 1)

    @contextmanager
    def busy(self, role: str, what: str) -> Iterator[None]:
        """`role` does `what` within the block."""
        begun = time.time()
        try:
            with self._pulse.during(PHASES[what]):
                yield
        finally:
            ended = time.time()
            self._seconds[role] += ended - begun
            if self._path is not None:
                span = {"role": role, "what": what, "iteration": self.iteration, "begin": begun, "end": ended}
                self._lines.append(json.dumps(span) + "\n")

    def taken(self) -> dict[str, float]:
        """Seconds of each role since the last call; spans go into the file."""
        found = dict(self._seconds)
        self._seconds.clear()
        if self._path is not None and self._lines:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a") as handle:
                handle.writelines(self._lines)
            self._lines.clear()
        return found
