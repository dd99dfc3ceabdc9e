"""RUN/events.jsonl: what happened to a run over all its lives, and where its time went."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from foundation.files import failures_named
from training.records import StepRecord
from training.survival.pulse import Pulse

EVENTS = "events.jsonl"
PROGRESS_SECONDS = 5.0
"""A life that ends without a last word leaves at most so much of its time unexplained."""


def read_events(folder: Path) -> list[dict[str, Any]]:
    """Every event of the run in `folder`, oldest first; a line that a crash cut short or damaged is left out: what a
    run was is no reason for it not to go on."""
    path = folder / EVENTS
    if not path.is_file():
        return []
    return list(_whole(path.read_text(errors="replace").splitlines(keepends=True)))


def _whole(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            found = json.loads(line) if line.endswith("}\n") else None
        except json.JSONDecodeError:
            continue
        if isinstance(found, dict) and {"time", "life", "event"} <= found.keys():
            yield found


def append_event(folder: Path, life: int, event: str, now: float | None = None, **values: Any) -> None:
    """One line at the end of the file, written at once.

    Raises:
        WorkError: the disk is full, or the file cannot be written.
    """
    path = folder / EVENTS
    line = {"time": round(time.time() if now is None else now, 3), "life": life, "event": event, **values}
    cut = path.is_file() and path.stat().st_size > 0 and not _ends_with_a_line(path)
    with failures_named(path), open(path, "a", encoding="utf-8") as handle:
        handle.write(("\n" if cut else "") + json.dumps(line) + "\n")


def _ends_with_a_line(path: Path) -> bool:
    with open(path, "rb") as handle:
        handle.seek(-1, 2)
        return handle.read(1) == b"\n"


def lives_before(folder: Path) -> int:
    """How often the run was started so far."""
    return max((int(event["life"]) for event in read_events(folder)), default=0)


class RunEvents:
    """The watcher that writes RUN/events.jsonl, on rank 0.

    Lines: `life` (the ranks have met), `begin` (the first step is next), `progress` (`step` done, `seconds` by phase
    since the life began), `rolled_back`, `said` (what people were told), `slow ranks`, `end` (the run left by itself).
    A life that was ended from outside has no `end`.
    """

    def __init__(self, folder: Path, life: int, pulse: Pulse, clock: Callable[[], float] = time.time) -> None:
        self._folder, self._life, self._pulse, self._clock = folder, life, pulse, clock
        self._written_at = -math.inf
        self._step = 0

    def begin(self, first_step: int, last_step: int) -> None:
        self._step = first_step - 1
        self.write("begin", first_step=first_step, last_step=last_step, seconds=self._seconds())

    def step_done(self, record: StepRecord) -> None:
        self._step = record.step
        # By the pulse's clock, which nobody sets: after an hour back there would be no progress for an hour.
        if self._pulse.clock() - self._written_at >= PROGRESS_SECONDS:
            self._progress()

    def rolled_back(self, to_step: int) -> None:
        self._progress()
        self._step = to_step
        self.write("rolled_back", to_step=to_step, seconds=self._seconds())

    def event(self, text: str) -> None:
        self._progress()
        self.write("said", text=text)

    def end(self) -> None:
        self._progress()
        self.write("end", step=self._step)

    def write(self, event: str, **values: Any) -> None:
        """One line."""
        append_event(self._folder, self._life, event, self._clock(), **values)

    def _progress(self) -> None:
        self._written_at = self._pulse.clock()
        self.write("progress", step=self._step, seconds=self._seconds())

    def _seconds(self) -> dict[str, float]:
        return {name: round(value, 4) for name, value in self._pulse.seconds().items()}
