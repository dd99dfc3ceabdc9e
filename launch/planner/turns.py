"""A pipeline whose ranks are more than the machine has cores: who can run shares them (processor sharing).

The schedule is that of `pipeline.py`. A stage that waits, for a neighbour's pass or for a message, leaves its cores to
the others: so a bubble costs only where fewer ranks can run than there are cores, and a step cannot be shorter than
all work over all cores.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from launch.planner.pipeline import Slot, stage_order

ROUNDING = 1e-12
"""Of the time that has passed: less work than that is none."""


@dataclass(frozen=True)
class Pass:
    """One forward or backward pass of a stage: seconds at work on a core of its own, and seconds off it, waiting for
    messages of the pass."""

    work: float
    wait: float = 0.0


@dataclass(frozen=True)
class Stage:
    """Passes of one chunk of a stage."""

    forward: Pass
    backward: Pass


@cache
def seconds_in_turns(
    stages: tuple[Stage, ...], chunks: int, micro_batches: int, ranks_each: int, cores: int, message: float
) -> float:
    """From the first pass to the end of the last.

    Args:
        stages: in order, alike for all their ranks and replicas.
        chunks: virtual stages of a rank.
        micro_batches: of one replica.
        ranks_each: ranks that run a stage, of all replicas: they are at the same pass.
        cores: that all ranks share; as many as run at once.
        message: seconds from the end of a pass to when its neighbour may go on from it.
    """
    run = _Run(stages, chunks, micro_batches, message)
    now = 0.0
    while not run.finished:
        run.start_what_can(now)
        at_work = run.at_work
        rate = min(1.0, cores / (len(at_work) * ranks_each)) if at_work else 1.0
        ends = [now + run.left[stage] / rate for stage in at_work] + run.moments(now)
        if not ends:
            raise AssertionError(f"{len(stages)} stages, {chunks} chunks, {micro_batches} micro-batches lock up")
        after = min(ends)
        for stage in at_work:
            run.left[stage] -= (after - now) * rate
        now = after
        run.end_what_is_done(now)
    return now


class _Run:
    """Where every stage is in its order."""

    def __init__(self, stages: tuple[Stage, ...], chunks: int, micro_batches: int, message: float) -> None:
        self._stages, self._message = stages, message
        self._last = len(stages) * chunks - 1
        self._orders = [stage_order(len(stages), chunks, micro_batches, stage) for stage in range(len(stages))]
        self._next = [0] * len(stages)
        self._done: dict[Slot, float] = {}  # (forward, position in the model, micro-batch)
        self.left: dict[int, float] = {}
        self._waits_until: dict[int, float] = {}

    @property
    def finished(self) -> bool:
        return all(place == len(order) for place, order in zip(self._next, self._orders, strict=True))

    @property
    def at_work(self) -> list[int]:
        return list(self.left)

    def start_what_can(self, now: float) -> None:
        """Give work to every stage whose next pass has all that it goes on from."""
        for stage in range(len(self._stages)):
            if stage in self.left or stage in self._waits_until or self._next[stage] == len(self._orders[stage]):
                continue
            ready = self._ready(stage)
            if ready is not None and ready <= now:
                self.left[stage] = self._pass(stage).work

    def moments(self, now: float) -> list[float]:
        """When something ends that no core is needed for."""
        arriving = [
            ready
            for stage in range(len(self._stages))
            if stage not in self.left and stage not in self._waits_until
            if (ready := self._ready(stage)) is not None and ready > now
        ]
        return [*self._waits_until.values(), *arriving]

    def end_what_is_done(self, now: float) -> None:
        """Work turns into waiting, waiting into a finished pass."""
        rounding = ROUNDING * now
        for stage in [stage for stage, left in self.left.items() if left <= rounding]:
            del self.left[stage]
            self._waits_until[stage] = now + self._pass(stage).wait
        for stage in [stage for stage, until in self._waits_until.items() if until <= now]:
            del self._waits_until[stage]
            forward, chunk, batch = self._orders[stage][self._next[stage]]
            self._done[forward, chunk * len(self._stages) + stage, batch] = now
            self._next[stage] += 1

    def _pass(self, stage: int) -> Pass:
        forward = self._orders[stage][self._next[stage]][0]
        return self._stages[stage].forward if forward else self._stages[stage].backward

    def _ready(self, stage: int) -> float | None:
        """When what the next pass goes on from is there; None while nobody knows."""
        if self._next[stage] == len(self._orders[stage]):
            return None
        forward, chunk, batch = self._orders[stage][self._next[stage]]
        position = chunk * len(self._stages) + stage
        if position == (0 if forward else self._last):
            return 0.0
        ended = self._done.get((forward, position + (-1 if forward else 1), batch))
        return None if ended is None else ended + self._message
