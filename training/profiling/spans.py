"""When a rank ran which pass: core's schedules say so to the timers of their configuration, and here stands in one."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import torch

Kind = Literal["forward", "backward", "schedule"]
KINDS: dict[str, Kind] = {
    "forward-compute": "forward",
    "backward-compute": "backward",
    "forward-backward": "schedule",
}
"""Names that core gives them; its other timers are not kept."""
READINGS = 9
"""Of a host's two clocks, one after the other."""


class Span(NamedTuple):
    """One pass; `begin` and `end` in seconds since the epoch on this rank's node."""

    kind: Kind
    begin: float
    end: float


class Clock(Protocol):
    """Marks moments, and says later when they were."""

    def mark(self) -> Any:
        """This moment, for what was asked of the device so far."""

    def seconds(self, marks: Sequence[Any]) -> list[float]:
        """Seconds since the epoch of each."""


class HostClock:
    """For passes that run where they are called."""

    def __init__(self) -> None:
        # Held up between its two readings, a rank would be behind the others by as long.
        self._epoch = max(time.time() - time.perf_counter() for _ in range(READINGS))

    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, marks: Sequence[float]) -> list[float]:
        return [self._epoch + mark for mark in marks]


class DeviceClock:
    """For passes that a GPU runs later than they are called: events in its stream. Not run so far: it needs a GPU."""

    def __init__(self) -> None:
        self._first = self.mark()
        self._first.synchronize()
        self._began = time.time()

    def mark(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, marks: Sequence[Any]) -> list[float]:
        for mark in marks:
            mark.synchronize()
        return [self._began + self._first.elapsed_time(mark) / 1e3 for mark in marks]


class Spans:
    """In the place of core's `Timers`: `config.timers(name).start()` and `.stop()` mark when passes begin and end."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._marks: list[tuple[Kind, Any, Any]] = []
        self._timers: dict[str, _Timer] = {
            name: _Timer(clock.mark, kind, self._marks.append) for name, kind in KINDS.items()
        }
        self._ignored = _Ignored()

    def __call__(self, name: str, log_level: int | None = None) -> _Timer | _Ignored:
        return self._timers.get(name, self._ignored)

    def take(self) -> list[Span]:
        """What has ended since the last call, in the order in which it ended."""
        kept = list(self._marks)
        self._marks.clear()
        times = self._clock.seconds([mark for _, begin, end in kept for mark in (begin, end)])
        return [
            Span(kind, begin, end)
            for (kind, _, _), begin, end in zip(kept, times[::2], times[1::2], strict=True)
        ]  # fmt: skip


class _Timer:
    def __init__(self, mark: Callable[[], Any], kind: Kind, keep: Callable[[tuple[Kind, Any, Any]], None]) -> None:
        self._mark, self._kind, self._keep = mark, kind, keep
        self._begun: Any = None

    def start(self, barrier: bool = False) -> None:
        self._begun = self._mark()

    def stop(self, barrier: bool = False) -> None:
        self._keep((self._kind, self._begun, self._mark()))


class _Ignored:
    def start(self, barrier: bool = False) -> None: ...

    def stop(self, barrier: bool = False) -> None: ...
